"""How many compilations run at once, on machines of files: memory, control groups, MAX_JOBS."""

import pytest

from fbopt._build import jobs as _jobs
from fbopt._build.compiler import BuildError

GB = 10**9
HUGE = 9223372036854771712  # what version 1 writes for "no limit"
MEMINFO = "MemTotal:  99000000 kB\nMemFree: 1 kB\nMemAvailable:  {} kB\nHugePages_Total: 0\n"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Sixteen cores and 64 GB available."""
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(_jobs, "ROOT", tmp_path)
    monkeypatch.setattr(_jobs, "cores", lambda: 16)
    write(tmp_path, {"proc/meminfo": MEMINFO.format(64 * GB // 1024)})


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))


def v2(folder, limit, used, stat=""):
    names = {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    return {f"{V2}{folder}/{name}": text for name, text in names.items()}


def v1(folder, limit, used, stat=""):
    names = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"{V1}{folder}/memory.{name}": text for name, text in names.items()}


def group(line):
    return {"proc/self/cgroup": f"{line}\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"proc/meminfo": MEMINFO.format(9 * GB // 1024)}, 4),
        ({"proc/meminfo": MEMINFO.format(1)}, 1),
        # Version 2: the group's own limit, one above it, none, and cached files.
        (group("0::/a/b") | v2("/a/b", 8 * GB, 2 * GB), 3),
        (group("0::/a/b") | v2("/a/b", "max", 0) | v2("/a", 8 * GB, 0), 4),
        (group("0::/a/b") | v2("/a/b", "max", 2 * GB), 16),
        (group("0::/a/b") | v2("/a/b", 8 * GB, 8 * GB, f"anon 1\ninactive_file {6 * GB}\n"), 3),
        (group("0::/a/b") | v2("/a/b", 8 * GB, 9 * GB), 1),
        # In a container: its path is the host's, or out of its sight.
        (group("0::/docker/1234") | v2("", 4 * GB, 0), 2),
        (group("0::/../../1234") | v2("", 4 * GB, 0), 2),
        # Version 1, alone or mixed with 2.
        (group("4:memory:/a") | v1("/a", 8 * GB, 2 * GB), 3),
        (group("4:cpu,memory:/a") | v1("/a", HUGE, 0) | v1("", 6 * GB, 0), 3),
        (group("4:memory:/docker/1") | v1("", 6 * GB, 0), 3),
        (group("4:memory:/a\n0::/b") | v1("/a", HUGE, 0), 16),
        (
            group("4:memory:/a")
            | v1("/a", 8 * GB, 8 * GB, f"inactive_file 1\ntotal_inactive_file {4 * GB}"),
            2,
        ),
        (group("4:memory_pressure:/a\n5:cpuset:/a") | v1("/a", 2 * GB, 0), 16),
    ],
)
def test_memory_caps_the_jobs(files, expected, tmp_path):
    write(tmp_path, files)
    assert _jobs.jobs(2.0) == expected


@pytest.mark.parametrize(("asked", "expected"), [("", 16), ("3", 3), (" 3 ", 3), ("99", 32)])
def test_max_jobs_takes_the_place_of_the_cores(asked, expected, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", asked)
    assert _jobs.jobs(2.0) == expected


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_max_jobs_has_to_be_a_positive_integer(asked, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", asked)
    with pytest.raises(BuildError, match=f"MAX_JOBS is '{asked}'; set MAX_JOBS to a positive"):
        _jobs.jobs(2.0)


def test_where_the_system_has_no_such_files(monkeypatch, tmp_path):
    """As on macOS."""
    monkeypatch.setattr(_jobs, "ROOT", tmp_path / "nothing")
    pages = {"SC_PHYS_PAGES": 10 * GB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert _jobs.jobs(2.0) == 4


def test_this_machine_has_memory_and_cores(monkeypatch):
    monkeypatch.undo()
    assert _jobs.cores() >= 1 and _jobs.memory() > 0
