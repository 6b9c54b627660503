"""The GPU check without a GPU: rehearsed on the CPU, and its judgements on made-up findings."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, gpu_stages, sanitized, train_step
from benchmarks.cases import WrongResult

pytestmark = pytest.mark.usefixtures("one_thread")
NO_DOCTOR = SimpleNamespace(run=lambda *args, **options: None)


@pytest.fixture
def small(monkeypatch):
    """Few shapes for the kernels, few images for a step."""
    monkeypatch.setattr(sanitized, "SHAPES", sanitized.SHAPES[:5])
    monkeypatch.setattr(sanitized, "MANY", sanitized.MANY[:40])
    monkeypatch.setitem(train_step.CHECKED, "images", 10)


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def read(folder) -> tuple[dict, str]:
    """The results of a rehearsal."""
    content = json.loads((folder / "gpu-check-rehearsal-quick.json").read_text())
    return content["stages"], (folder / "gpu-check-rehearsal-quick.md").read_text()


def test_all_stages_rehearse(small, tmp_path, monkeypatch, capsys):
    """Each command line is run in this process, that of pytest excepted."""

    def run(command, seconds, environment):
        module, arguments = importlib.import_module(command[2]), command[3:]
        if arguments[0] == "sanitize":
            module, arguments = sanitized, ["--device", "cpu"]
        if arguments[0] != "tests":
            module.main(arguments)
        return 0, capsys.readouterr().out

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_stages, "subprocess", NO_DOCTOR)
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    stages, text = read(tmp_path)
    assert list(stages) == list(gpu_check.STAGES)
    assert all(stage["status"] == "passed" for stage in stages.values())
    assert "CPU kernels" in stages["build"]["output"]
    assert sanitized.AGREED in stages["sanitize"]["output"]
    assert "a rehearsal without a GPU" in text.splitlines()[0]
    for name in gpu_check.BENCHMARKS:
        assert f"python -m benchmarks.{name} " in text
        assert list(tmp_path.glob(f"{name.replace('_', '-')}-*-quick.json"))


OUTCOMES = {
    "print('fine')": ("passed", 0),
    "import sys; print('last words'); sys.exit(3)": ("failed with exit status 3", 1),
    "import sys; sys.exit(77)": ("not available", 0),
    "import time; time.sleep(60)": ("stopped: out of time", 1),
}


@pytest.mark.parametrize("text", OUTCOMES, ids=[status for status, _ in OUTCOMES.values()])
def test_a_stage_that_fails_is_told(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "command_of", lambda stage, choice: python(text))
    limit = "1" if "sleep" in text else "60"
    choice = ["--device", "cpu", "--out", str(tmp_path), "--stage-seconds", limit]
    status, code = OUTCOMES[text]
    assert gpu_check.main(["ops", *choice]) == code
    assert gpu_check.main(["build", *choice]) == code  # updates its own part
    stages, markdown = read(tmp_path)
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "build": status,
        "ops": status,
    }
    assert status in capsys.readouterr().out and status in markdown
    assert ("last words" in markdown) == ("last words" in text)


def test_what_a_stage_started_ends_with_it():
    sleeps = "import time; time.sleep(60)"
    starts = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{sleeps}'])"
    command = python(f"{starts}; print(p.pid, flush=True); p.wait()")
    status, output = gpu_check.run(command, 2, os.environ)
    assert status is None
    stat = Path(f"/proc/{int(output)}/stat")
    for _ in range(100):  # a signal takes effect when the process next runs
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.1)
    pytest.fail("the process goes on")


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main(["opps", "--device", "cpu"])


def test_no_stage_falls_back_on_a_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_check, "run", lambda *given: seen.append(given) or (0, ""))
    for stage in gpu_check.STAGES:
        choice = SimpleNamespace(device="cuda", quick=False, out="o", stage_seconds=540.0)
        assert gpu_check.run_stage(stage, choice)["status"] == "passed"
    assert all(environment["FBOPT_BACKEND"] == "kernels" for _, _, environment in seen)


def test_no_kernels_fail_the_build(monkeypatch, capsys):
    monkeypatch.setattr(gpu_stages, "subprocess", NO_DOCTOR)
    monkeypatch.setattr(gpu_stages.load, "cuda_kernels", lambda: None)
    assert gpu_stages.main(["build", "--device", "cuda"]) == 1
    assert "there are no CUDA kernels" in capsys.readouterr().out


SUITES = {
    "def test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass": 0,
    "def test_a(): assert False\ndef test_b(): pass": 1,
    "@pytest.mark.skip\ndef test_a(): pass": 1,
}


@pytest.mark.parametrize("text", SUITES, ids=["passed", "failed", "all skipped"])
def test_suite_is_judged(text, tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text(f"import pytest\n{text}\n")
    assert gpu_stages.tests("cpu", 60, [str(path)]) == SUITES[text]


AGREED = f"9 {sanitized.AGREED}"
# Says what compute-sanitizer would: an error where one is planted, and in what is told to have one.
FAKE = f"""\
#!{sys.executable}
import sys
found = 3 if "--plant" in sys.argv or "CHECK" in sys.argv else 0
print("{AGREED}")
print("=========", "RACECHECK" if "racecheck" in sys.argv else "ERROR", "SUMMARY:", found, "errors")
sys.exit(86 if found else 0)
"""


@pytest.mark.parametrize(
    "bad,status", [("none", 0), *((check, 1) for check in gpu_stages.CHECKS), ("missing", 77)]
)
def test_sanitizer_is_judged(bad, status, tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    if bad != "missing":
        tool.write_text(FAKE.replace('CHECK"', f'{bad}"', 1))
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", "/no/such/folder")
    monkeypatch.setattr(gpu_stages.load, "cuda_kernels", lambda: None)
    assert gpu_stages.main(["sanitize"]) == status
    printed = capsys.readouterr().out
    if bad == "missing":
        assert "neither on the PATH nor in /no/such/folder/bin" in printed
    else:
        assert "a planted write out of bounds: 3 errors" in printed
        assert (f"{bad}: 3 errors" in printed) == bool(status)


def test_a_tool_that_sees_nothing_is_not_clean():
    none = "= ERROR SUMMARY: 0 errors"
    assert gpu_stages.judge(0, f"{AGREED}\n{none}") == "clean"
    assert gpu_stages.judge(86, "= RACECHECK SUMMARY: 1 hazard displayed") == "1 errors"
    assert gpu_stages.judge(1, f"= Error: Device not supported\n{none}") == "not supported"
    for status, output in ((0, none), (1, f"{AGREED}\n{none}"), (-11, "Segmentation fault")):
        assert gpu_stages.judge(status, output) == f"no result, exit status {status}"


def test_driver_catches_a_wrong_kernel(small, monkeypatch):
    right = sanitized.dispatch.perturb_

    def wrong(out, params, grads, radius, *known):
        square = right(out, params, grads, radius, *known)
        out.view(-1)[-1] += 0.1
        return square

    monkeypatch.setattr(sanitized.dispatch, "perturb_", wrong)
    with pytest.raises(WrongResult, match=r"perturb_ of 5 tensors, torch\.float32, clone"):
        sanitized.main(["--device", "cpu"])
