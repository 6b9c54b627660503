"""The cores that a process may use, from made-up folders of the system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fbopt.train.config.cores import usable_cores


def system(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def hyperthreads(name: str = "core_cpus_list") -> dict[str, str]:
    """Eight processors on four cores: 0 and 4, 1 and 5, …"""
    topology = "sys/devices/system/cpu/cpu{}/topology/" + name
    return {topology.format(cpu): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hyperthreads_are_one_core(tmp_path, name):
    root = system(tmp_path, hyperthreads(name))
    assert usable_cores(range(8), root) == 4
    assert usable_cores([0, 1, 4], root) == 2
    assert usable_cores([3, 7], root) == 1


def test_processors_count_where_nothing_is_known(tmp_path):
    assert usable_cores([1, 2, 5], tmp_path) == 3


VERSION_2 = "0::/user/job"
VERSION_1 = "4:memory:/other\n3:cpu,cpuacct:/user/job\n0::/"
QUOTAS = {
    "none": (VERSION_2, {"user/job/cpu.max": "max 100000"}, 4),
    "own": (VERSION_2, {"user/job/cpu.max": "250000 100000"}, 2),
    "less than one": (VERSION_2, {"user/job/cpu.max": "50000 100000"}, 1),
    "above": (VERSION_2, {"user/job/cpu.max": "300000 100000", "user/cpu.max": "2000 1000"}, 2),
    "container": (VERSION_2, {"cpu.max": "100000 100000"}, 1),
    "top": ("0::/", {"cpu.max": "300000 100000"}, 3),
    "version 1": (
        VERSION_1,
        {"cpu,cpuacct/user/job/cpu.cfs_quota_us": "300000",
         "cpu,cpuacct/user/job/cpu.cfs_period_us": "100000", "memory/other/cpu.max": "1 1"}, 3,
    ),
    "version 1, none": (
        VERSION_1,
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_of_every_cgroup_above_counts(tmp_path, case):
    group, limits, expected = QUOTAS[case]
    files = {f"sys/fs/cgroup/{name}": content for name, content in limits.items()}
    root = system(tmp_path, hyperthreads() | files | {"proc/self/cgroup": group})
    assert usable_cores(range(8), root) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_the_affinity_of_this_process_counts():
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(own)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, own)
