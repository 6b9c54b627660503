"""The GPU check without a GPU: every stage is rehearsed on the CPU; judgements, goals and merging
are shown on made-up findings. No test reads a clock.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence

import pytest
import torch

from benchmarks import cases, devices, dossier, gpu_check, ops, processes, rivals, traces
from benchmarks import sanitized as parity
from benchmarks.cases import WrongResult
from benchmarks.gpu import STAGES, Settings, StageFailed, Unavailable, build, graphs, sanitize, step
from benchmarks.gpu import __main__ as child
from benchmarks.gpu import ops as kernels
from benchmarks.gpu import tests as suite
from benchmarks.harness import Timing, Timings
from benchmarks.processes import Finished
from benchmarks.report import Report
from benchmarks.single import WORDS
from fbopt._build.compiler import BuildError

FEW = [torch.Size(s) for s in ((3, 4), (), (5,), (2, 3, 3, 3))]
GPU = torch.device("cuda")


@pytest.fixture
def report() -> Report:
    return Report("gpu_check", [])


@pytest.fixture
def small(monkeypatch):
    """Sizes that take no time, and a test run and a parity run that went well."""
    for module in (ops, kernels):
        monkeypatch.setattr(module, "shapes", lambda size: FEW)
    monkeypatch.setattr(ops, "limits", lambda words, device: [])
    monkeypatch.setattr(kernels, "REHEARSED", ("small-cnn",))
    monkeypatch.setattr(graphs, "REHEARSED_IMAGES", (2,))
    monkeypatch.setattr(graphs, "REHEARSED_CHUNKS", 2)
    monkeypatch.setattr(step, "REHEARSED_CHUNK", 2)
    for module in (graphs, step):
        monkeypatch.setattr(module, "VISITS", 1)
        monkeypatch.setattr(module, "REHEARSED_WIDTH", 2)
    monkeypatch.setattr(build, "_doctor", lambda: "two\nlines")
    monkeypatch.setattr(suite, "pytest", lambda select: suite.Outcome(2, 0, 0, 1))

    def run(command, seconds, environment=None, echo=True):
        if tuple(command[:3]) == gpu_check.CHILD:  # in this process
            return Finished(child.main(list(command[3:])), "")
        return Finished(0, f"4 {parity.AGREED}")

    monkeypatch.setattr(processes, "run", run)


def read(folder) -> tuple[dict, str]:
    """The results of a rehearsal."""
    content = json.loads((folder / "gpu-rehearsal.json").read_text())
    return content, (folder / "gpu-rehearsal.md").read_text()


def test_all_stages_rehearse(small, tmp_path, capsys):
    choice = ["--device", "cpu", "--quick", "--rounds", "1", "--images", "5"]
    choice += ["--precisions", "bf16", "float32", "--out", str(tmp_path)]
    assert gpu_check.main(choice) == 0
    content, text = read(tmp_path)
    assert list(content["stages"]) == list(STAGES)
    assert "a rehearsal: no GPU" in text.splitlines()[0]
    tables = dict.fromkeys(STAGES, 0) | {"ops": 2, "finishing": 1, "graphs": 2, "step": 2}
    for name, part in content["stages"].items():
        assert part["status"] == "passed", part["why"]
        assert part["command"].startswith(f"python -m benchmarks.gpu_check {name} --device cpu")
        assert len(part["tables"]) == tables[name]
        assert all(goal["goal"] is None for goal in part["goals"])
        assert f"\n## {dossier.TITLES[name]}\n" in text
        for table in part["tables"]:
            assert f"### {table['title']}\n\nn = 1 rounds\n" in text
    ragged, whole = content["stages"]["step"]["tables"]
    assert "5 images in chunks of 2, bfloat16" in ragged["title"]
    assert "4 images in chunks of 2, float32" in whole["title"]
    assert len(ragged["rows"]) == len(step.KINDS) + len(step.GRAPHED)
    assert "== stages" in capsys.readouterr().out[-3000:]


def test_a_stage_alone_updates_its_part(small, tmp_path):
    out = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    for stage in ("tests", "build", "tests"):
        assert gpu_check.main([stage, *out]) == 0
    content, text = read(tmp_path)
    assert list(content["stages"]) == ["build", "tests"]
    assert content["command"].startswith("python -m benchmarks.gpu_check tests --device cpu")
    assert text.index("## Build") < text.index("## Tests marked cuda")
    assert "fbopt doctor:\n\n    two\n    lines" in text


CHILD = """\
import json, os, pathlib, sys, time
stage, file = sys.argv[1], pathlib.Path(sys.argv[2])
part = {"machine": {"cpu": "c"}, "tables": [], "goals": [], "facts": {"seen": stage}}
file.write_text(json.dumps(part))
if stage == "build":
    print("last words")
    os.abort()
if stage == "tests":
    time.sleep(60)
status = "failed" if stage == "sanitize" else "passed"
file.write_text(json.dumps(part | {"status": status, "why": "so it is", "seconds": 1.0}))
"""


def test_stages_that_fail_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(gpu_check, "CHILD", (sys.executable, str(script)))
    limit = ["--stage-seconds", "1.5"]
    stages = ["ops", "sanitize", "tests", "build"]
    command = [*stages, "--device", "cpu", *limit, "--out", str(tmp_path)]
    assert gpu_check.main(command) == 1
    found = read(tmp_path)[0]["stages"]
    assert {name: part["status"] for name, part in found.items()} == {
        "build": "failed",
        "tests": "failed",
        "sanitize": "failed",
        "ops": "passed",
    }
    assert found["build"]["why"] == "ended with exit status -6"
    assert found["build"]["output"] == "last words"
    assert found["tests"]["why"] == "stopped after 2 s"
    assert all(part["facts"] == {"seen": name} for name, part in found.items())
    assert "so it is" in capsys.readouterr().out[-1000:]
    assert gpu_check.main(["ops", *command[4:]]) == 0


@pytest.mark.parametrize(
    "error,status,code",
    [
        (StageFailed("broken"), "failed", 1),
        (ValueError("broken"), "failed", 1),
        (Unavailable("broken"), "not available", 0),
    ],
    ids=repr,
)
def test_what_a_stage_finds_is_kept(error, status, code, tmp_path, monkeypatch):
    def run(report: Report, settings: Settings) -> None:
        report.fact("found", 1)
        assert "status" not in json.loads(file.read_text())
        raise error

    file = tmp_path / "part.json"
    monkeypatch.setattr(build, "run", run)
    assert child.main(["build", str(file), "--device", "cpu"]) == code
    part = json.loads(file.read_text())
    assert (part["status"], part["facts"]) == (status, {"found": "1"})
    assert part["why"].endswith("broken")


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("No GPU: torch") and "--device cpu --quick" in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu_check.main(["opps", "--device", "cpu"])


def test_results_are_named_after_the_device(monkeypatch):
    monkeypatch.setattr(devices, "name", lambda device: "NVIDIA H100 80GB HBM3")
    assert gpu_check.file_stem(GPU, quick=False) == "gpu-nvidia-h100-80gb-hbm3"
    assert gpu_check.file_stem(GPU, quick=True) == "gpu-nvidia-h100-80gb-hbm3-quick"
    assert gpu_check.file_stem(devices.CPU, quick=True) == "gpu-rehearsal"


def test_no_stage_falls_back_on_a_gpu():
    assert gpu_check.environment("ops", "cuda")["FBOPT_BACKEND"] == "kernels"


@pytest.mark.parametrize("compiles", [True, False])
def test_no_kernels_fail_the_build(compiles, report, monkeypatch):
    def nothing() -> None:
        return None

    for name in ("kernels", "cuda_kernels"):
        monkeypatch.setattr(build._build, name, nothing)
    monkeypatch.setattr(build._build, "find_kernels", nothing)
    monkeypatch.setattr(build, "_doctor", lambda: "")
    if compiles:
        monkeypatch.setattr(build._build, "kernels", lambda: "a module")
        monkeypatch.setattr(build._build, "find_cuda", nothing)
    what = "CUDA kernels" if compiles else "CPU kernels"
    with pytest.raises(StageFailed, match=f"there are no {what}"):
        build.run(report, Settings())
    assert compiles == report.facts.get("CPU kernels", "").startswith("compiled and loaded")


SUITES = {
    "def test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass": None,
    "def test_a(): assert False": "1 tests failed, 0 errors",
    "import no_such_module": "0 tests failed, 1 errors",
    "@pytest.mark.skip\ndef test_a(): pass": "all 1 tests were skipped",
    "": "no test was collected",
}


@pytest.mark.parametrize("text,failure", SUITES.items(), ids=map(str, SUITES.values()))
def test_suite_is_judged(text, failure, report, tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text(f"import pytest\n{text}\n")
    if failure is None:
        suite.run(report, Settings(), [str(path)])
        assert report.facts["tests"] == "1 passed, 0 failures, 0 errors, 1 skipped"
        return
    with pytest.raises(StageFailed, match=failure):
        suite.run(report, Settings(), [str(path)])


def test_suite_is_that_of_the_marker(report, monkeypatch):
    asked = []
    monkeypatch.setattr(suite, "pytest", lambda s: asked.append(s) or suite.Outcome(1, 0, 0, 0))
    suite.run(report, Settings())
    assert asked == [("-m", "cuda")]


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """A stand-in for compute-sanitizer, alone on the PATH, that sees what it is told to."""

    def make(seen: str) -> None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!{sys.executable}\nimport sys\nwords = sys.argv[1:]\n{seen}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.setattr(sanitize._build, "cuda_kernels", lambda: None)
    return make


SEES = f"""\
word, what = ("RACECHECK", "hazards") if "racecheck" in words else ("ERROR", "errors")
found = 3 if "--plant" in words or "CHECK" in words else 0
print("9 {parity.AGREED}")
print("=========", word, "SUMMARY:", found, what, "displayed")
sys.exit(86 if found else 0)
"""


@pytest.mark.parametrize("check", ["none", *sanitize.CHECKS[1:]])
def test_sanitizer_findings_are_judged(check, sanitizer, report):
    sanitizer(SEES.replace('CHECK" in', f'{check}" in'))
    if check == "none":
        sanitize.run(report, Settings())
        assert all(report.facts[c] == "clean" for c in sanitize.CHECKS)
    else:
        with pytest.raises(StageFailed, match=f"^{check}: not clean"):
            sanitize.run(report, Settings())
        assert report.facts[check] == "3 errors"
    assert report.facts["memcheck, a planted write out of bounds"] == "3 errors"


def test_sanitizer_that_sees_nothing_fails(sanitizer, report):
    sanitizer('print("ERROR SUMMARY: 0 errors")')
    with pytest.raises(StageFailed, match="planted"):
        sanitize.run(report, Settings())


@pytest.mark.parametrize(
    "done,found",
    [
        (Finished(0, f"340 {parity.AGREED}\n= ERROR SUMMARY: 0 errors"), "clean"),
        (Finished(0, "= ERROR SUMMARY: 0 errors"), "the parity run failed"),
        (Finished(1, f"{parity.AGREED}\n= ERROR SUMMARY: 0 errors"), "the parity run failed"),
        (Finished(86, f"{parity.AGREED}\n= ERROR SUMMARY: 2 errors"), "2 errors"),
        (Finished(86, "= RACECHECK SUMMARY: 1 hazard displayed (1 error)"), "1 errors"),
        (Finished(-11, "Segmentation fault"), "no summary (exit status -11): Segmentation fault"),
        (Finished(None, "= ERROR SUMMARY: 0 errors"), "not finished in time"),
    ],
)
def test_sanitizer_output_is_read(done, found):
    assert sanitize.judge(done).startswith(found)


def test_unsupported_device_is_no_finding():
    with pytest.raises(Unavailable, match="not supported"):
        sanitize.judge(Finished(1, "= Error: Device not supported\n= ERROR SUMMARY: 1 error"))


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME", "toolkit", None])
def test_sanitizer_is_looked_for(place, tmp_path, monkeypatch):
    def toolkit():
        if place != "toolkit":
            raise BuildError("no toolkit", "install one")
        return type("Toolkit", (), {"home": tmp_path})

    monkeypatch.setattr(sanitize._toolkit, "toolkit", toolkit)
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "/no/such/folder")
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    if place is None:
        with pytest.raises(Unavailable, match=r"not found \(looked on the PATH, /no/such"):
            sanitize.find()
        return
    if place != "toolkit":
        monkeypatch.setenv(place, str(tool.parent if place == "PATH" else tmp_path))
    assert sanitize.find() == tool


def test_parity_run(monkeypatch, capsys):
    monkeypatch.setattr(parity, "SHAPES", [*FEW, torch.Size([0]), torch.Size([33, 5])])
    monkeypatch.setattr(parity, "MANY", parity.MANY[:40])
    assert parity.main(["--device", "cpu"]) == 0
    assert parity.AGREED in capsys.readouterr().out
    right = parity._ops.perturb_

    def wrong(out, params, grads, radius, *known):
        square = right(out, params, grads, radius, *known)
        out.view(-1)[-1] += 0.1
        return square

    monkeypatch.setattr(parity._ops, "perturb_", wrong)
    with pytest.raises(WrongResult, match=r"perturb_ of 6 tensors, torch\.float32, dense"):
        parity.main(["--device", "cpu"])


@pytest.mark.parametrize("layout", parity.LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts_hold_the_values(layout):
    for shape in FEW:
        t = torch.randn(shape)
        placed = layout(t, devices.CPU)
        assert torch.equal(placed, t) and placed.data_ptr() != t.data_ptr()
    t = torch.randn(2, 3, 4, 5)
    placed = layout(t, devices.CPU)
    distinct = {
        "dense": placed.is_contiguous(),
        "misaligned": placed.data_ptr() % 16 != 0,
        "gapped": placed.stride(-1) == 2,
        "transposed": placed.stride() == (1, 2, 6, 24),
        "channels_last": placed.is_contiguous(memory_format=torch.channels_last),
    }
    assert distinct[layout.__name__]


def timings(title: str = "t", **seconds: float) -> Timings:
    """Rows of which each round took the same, on the device and twice that by the wall."""
    rows = [Timing(n.replace("_", " "), [s] * 3, wall=[2 * s] * 3) for n, s in seconds.items()]
    return Timings(title, rows)


def goals(report: Report) -> list[tuple[str, float, str | None, bool | None]]:
    return [(g["claim"], round(g["value"], 6), g["goal"], g["met"]) for g in report.goals]


NAMES = [rivals.Ours, rivals.Published, *rivals.FOREACH, *rivals.UNSYNCED]


@pytest.mark.parametrize(
    "seconds,busy,found",
    [
        (
            [1, 9, 1.6, 1.5, 1.7, 2.3, 2.1],
            {},
            [
                (rivals.ForeachSwapped.name, 1.5, "≥ 1.5", True),
                (rivals.ForeachUnsyncedSwapped.name, 2.1, "≥ 2.2", False),
                ("as published, device time, gaps counted in", 9, "≥ 3.5", True),
                ("as published, wall", 9, "≥ 8", True),
            ],
        ),
        (
            [2, 14, 2.9, 4, 4, 4.4, 5],
            {"fbopt": 2.0, "as published": 6.8},
            [
                (rivals.Foreach.name, 1.45, "≥ 1.5", False),
                (rivals.ForeachUnsynced.name, 2.2, "≥ 2.2", True),
                ("as published, time of its kernels", 3.4, "≥ 3.5", False),
                ("as published, wall", 7, "≥ 8", False),
            ],
        ),
    ],
)
def test_goals_of_the_chunk_update(seconds, busy, found, report):
    rows = [Timing(k.name, [s] * 3, wall=[s] * 3) for k, s in zip(NAMES, seconds, strict=True)]
    kernels.chunk_goals(report, Timings("t", rows), busy, goals=True)
    assert goals(report) == found
    report.goals.clear()
    kernels.chunk_goals(report, Timings("t", rows), busy, goals=False)
    assert all(goal["goal"] is None for goal in report.goals)


def test_goals_of_single_kernels(report):
    rows = [Timing("copy", [1.0], 100)]
    rows += [Timing(op, [1 + 0.05 * i], 100, "copy") for i, op in enumerate(WORDS)]
    kernels.single_goals(report, Timings("t", rows))
    assert [(name, met) for name, _, _, met in goals(report)] == [
        (op, i < 4) for i, op in enumerate(WORDS)
    ]


def test_goals_of_whole_steps(report):
    table = timings("t", fbopt=2.0, bare_passes=1.9, foreach=3.0)
    more = {"fbopt, graphs": 1.0, "bare passes, graphs": 0.94}
    table.rows.extend(Timing(name, [s] * 3) for name, s in more.items())
    best = step.conclude(report, table, goals=True)
    assert best == {"t: fbopt": 2.0, "t: fbopt, graphs": 1.0}
    assert goals(report) == [
        ("fbopt", 0.95, "≥ 0.95", True),
        ("foreach: time over fbopt's", 1.5, None, None),
        ("fbopt, graphs", 0.94, "≥ 0.95", False),
    ]


@pytest.mark.parametrize(
    "device,images,goal", [("NVIDIA H100", 50_000, "≤ 2.5"), ("other", 50_000, None), ("", 10, 0)]
)
def test_goal_of_the_best_step(device, images, goal, report, monkeypatch):
    title = f"One penalised step of ResNet-18, {images:,} images in chunks of 128, x"
    monkeypatch.setattr(step, "check", lambda settings: None)
    monkeypatch.setattr(step, "table", lambda *args: timings(title, fbopt=2.4, bare_passes=2.4))
    report.machine["device"] = device
    step.run(report, Settings(device="cpu", precisions=("bf16",)))
    last = goals(report)[-1]
    if goal == 0:
        assert last[0] == "fbopt"
    else:
        assert last == (f"{title}: fbopt", 2.4, goal, goal and True)


@pytest.mark.parametrize(
    "each,images,seconds,rounds,quick,found",
    [
        (1e-3, 1000, 10, None, False, (1000, 10)),
        (1e-3, 1000, 1000, None, False, (1000, step.MOST_ROUNDS)),
        (1e-3, 1000, 1, None, False, (256, 3)),
        (1e-3, 1000, -1, None, False, (128, 3)),
        (1e-3, 1000, 1, None, True, (1000, 3)),
        (1e-3, 1000, 1, 7, False, (1000, 7)),
    ],
)
def test_steps_fit_the_time(each, images, seconds, rounds, quick, found):
    assert step.schedule(each, images, 128, seconds, rounds, quick) == found


def event(cat: str, name: str, ts: float, dur: float = 1) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_traces_are_read():
    call = event("user_annotation", traces.RANGE, 10, 10)
    events: Sequence[dict] = [
        {"ph": "M", "name": "process_name", "ts": 0},
        event("cuda_runtime", "cudaDeviceSynchronize", 5),
        call,
        event("gpu_user_annotation", traces.RANGE, 12, 30),
        event("gpu_memcpy", "Memcpy DtoH", 24, 2),
        event("kernel", "second", 21, 3),
        event("kernel", "first", 20, 5),
        event("cuda_runtime", "cudaLaunchKernel", 12),
        event("cuda_runtime", "cudaStreamSynchronize", 14),
        event("cuda_runtime", "cudaDeviceSynchronize", 25),
    ]
    found = traces.summary(events)
    assert found.launches == ("first", "second", "Memcpy DtoH")
    assert found.busy_seconds == pytest.approx(10e-6)
    assert found.waits == ("cudaStreamSynchronize",)
    assert traces.summary([call]) is None  # a profiler that sees no device
    assert traces.trace(list, list, devices.CPU) is None


def test_waits_are_refused(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    assert traces.refused_sync(list, GPU) is None
    assert traces.refused_sync(waits, GPU) == "called a synchronizing CUDA operation"
    assert modes == ["error", "default"] * 2


def test_launches_are_reported(report, monkeypatch):
    """What the profiler would see, and the goals that go with it."""
    found = traces.Trace(("norm(float*)", "shift<int>(void*)"), 3e-6, ("cudaStreamSynchronize",))
    monkeypatch.setattr(kernels, "shapes", lambda size: FEW)
    monkeypatch.setattr(kernels, "trace", lambda run, prepare, device: (prepare(), run(), found)[2])
    busy = kernels.traces(report, "resnet18", devices.CPU)
    assert set(busy.values()) == {3e-6} and len(busy) == len(rivals.CHUNK_UPDATES) - 1
    assert report.facts["resnet18: what fbopt launches"] == "norm; shift<int>"
    assert [(goal["value"], goal["goal"], goal["met"]) for goal in report.goals] == [
        (2, "≤ 4", True),
        (1, "≤ 0", False),
    ] * 2


def test_summary_shows_what_was_missed():
    part = {
        "status": "failed",
        "why": "w",
        "seconds": 3.0,
        "machine": {"device": "D"},
        "command": "",
    }
    goal = {"about": "a", "claim": "c", "value": 1.0, "goal": "≥ 2", "met": False}
    part |= {"goals": [goal, goal | {"goal": None, "met": None, "claim": "free"}], "tables": []}
    content = {"command": "it", "stages": {"ops": part}}
    printed = dossier.printed(content, {"ops": part})
    assert "MISSED" in printed and "free" not in printed
    text = dossier.rendered(content)
    assert "free" in text and "| failed |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ops")}) == 2


def test_commands_end_in_time(tmp_path):
    found = processes.run([sys.executable, "-c", "print('a'); print('b')"], 60, echo=False)
    assert (found.status, found.output, found.last) == (0, "a\nb\n", "b")
    mark = tmp_path / "mark"
    script = f"""\
        import subprocess, sys, time
        print("begun", flush=True)
        subprocess.Popen([sys.executable, "-c",
            "import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"])
        time.sleep(60)
    """
    late = processes.run([sys.executable, "-c", textwrap.dedent(script)], 1, echo=False)
    assert late.status is None and late.last == "begun"
    assert Finished(0, "\n").last == "no output"
    assert not mark.exists()


def test_sizes_of_the_gpu():
    assert [s.numel() for s in cases.shapes("large")] == [2**26]
    assert set(kernels.SIZES) <= cases.TITLES.keys()
