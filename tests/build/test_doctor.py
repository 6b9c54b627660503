"""`fbopt doctor`: its lines, its advice, and that nothing broken makes it fail or compile."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fbopt import doctor
from fbopt._build import compiler, cuda, load, ninja, wheel
from fbopt._build.compiler import BuildError

ROOT = Path(doctor.__file__).resolve().parent.parent
GPU = "NVIDIA H100"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No variables, an empty cache, a compiler, no GPU and no driver."""
    for name in ("FBOPT_BACKEND", "FBOPT_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(ninja, "_compile", lambda *args: pytest.fail("the doctor compiles"))
    monkeypatch.setattr(wheel, "FOLDER", tmp_path / "prebuilt")
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    tools = compiler.Toolchain(("/bin/c++",), (), '#define __VERSION__ "99.1.0"\n')
    for module in (compiler, load):
        monkeypatch.setattr(module, "toolchain", lambda *target: tools)
    monkeypatch.setattr(compiler, "find_headers", lambda: "/include")
    toolkit = cuda.Toolkit(Path("/cuda/bin/nvcc"), "13.5", (Path("/cuda/include"),))
    monkeypatch.setattr(cuda, "toolkit", lambda: toolkit)
    monkeypatch.setattr(cuda, "architectures", lambda tools: ("8.0", "9.0"))
    see(monkeypatch)


def examine(capsys):
    """The exit status, and the findings by the name that each line begins with."""
    status = doctor.main()
    out, err = capsys.readouterr()
    assert err == "" and "Traceback" not in out
    report = {}
    for line in out.splitlines()[1:]:
        what, found = line[2:13].strip(), line[14:]
        report[what] = f"{report[what]}\n{found}" if what in report else found
    return status, report


def see(monkeypatch, *gpus):
    """Let torch see these GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: gpus[gpu])


def have(monkeypatch, cpu=None, gpu=None):
    """Let there be these libraries already."""
    monkeypatch.setattr(load, "find_kernels", lambda: cpu)
    monkeypatch.setattr(load, "find_cuda", lambda: gpu)


def lack_a_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "toolchain", lambda: fail("no C++ compiler", "install one"))


def fail(cause="there is none", cure="install it"):
    raise BuildError(cause, cure)


def broken(*arguments):
    raise OSError("it is\nbroken")


def test_all_is_well(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "find_cuda", lambda: pytest.fail("looks for what nobody wants"))
    status, report = examine(capsys)
    labels = ["Python", "torch", "compiler", "ninja", "pybind11", "processor", "GPU", "cache"]
    assert status == 0 and list(report) == [*labels, "in use", "to do"]
    assert report["torch"] == f"{torch.__version__}, built with CUDA 13.0"
    assert report["compiler"] == "g++ 99.1.0 (/bin/c++), Python's headers in /include"
    assert report["processor"].endswith(" files compiled at a time")
    assert report["GPU"] == "none that torch sees"
    assert report["cache"] == str(tmp_path / "cache")
    assert report["in use"] == "the kernels, compiled at first use"
    assert report["to do"] == "nothing"


def test_kernels_in_the_cache(capsys, monkeypatch, tmp_path):
    """What is there already is used, also where a tool is broken that would build it."""
    have(monkeypatch, cpu=tmp_path / "cache" / "_C.so")
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("FBOPT_BACKEND", "kernels")
    status, report = examine(capsys)
    assert status == 0 and report["to do"] == "nothing"
    assert report["ninja"] == "no ninja (not needed)"
    assert report["in use"] == "the kernels, in the cache"


def test_a_gpu_and_a_toolkit(capsys, monkeypatch, tmp_path):
    see(monkeypatch, GPU, GPU)
    have(monkeypatch, cpu=tmp_path / "cache" / "_C.so")
    status, report = examine(capsys)
    assert status == 0 and report["to do"] == "nothing"
    assert report["GPU"] == f"{GPU}, {GPU}"
    assert report["toolkit"] == "CUDA 13.5 (/cuda/bin/nvcc), for 8.0, 9.0"
    assert report["on CUDA"] == "the CUDA kernels, compiled at first use"


def test_a_gpu_and_a_wheel(capsys, monkeypatch, tmp_path):
    """Neither compiler nor toolkit is missed; the CUDA kernels do not come without the others."""
    see(monkeypatch, GPU)
    lack_a_compiler(monkeypatch)
    folder = tmp_path / "prebuilt"
    have(monkeypatch, cpu=folder / "_C.avx2.so", gpu=folder / "_cuda.so")
    status, report = examine(capsys)
    assert status == 0 and report["to do"] == "nothing"
    assert report["in use"] == "the kernels, of the wheel"
    assert report["on CUDA"] == "the CUDA kernels, of the wheel"

    have(monkeypatch, cpu=folder / "_C.avx2.so")
    status, report = examine(capsys)
    assert status == 0 and report["to do"] == "compiler: install one"
    assert report["on CUDA"] == "plain torch, as the CUDA kernels cannot be compiled"

    have(monkeypatch, gpu=folder / "_cuda.so")
    status, report = examine(capsys)
    assert report["in use"] == "plain torch, as the kernels cannot be compiled"
    assert report["on CUDA"] == "plain torch, as the CUDA kernels cannot be compiled"


@pytest.mark.parametrize(
    ("variables", "gpus", "status", "on_cuda"),
    [
        ({}, [GPU], 0, "plain torch, as the CUDA kernels cannot be compiled"),
        ({"FBOPT_CUDA": "1"}, [], 1, "nothing: FBOPT_CUDA asks for the CUDA kernels"),
        ({"FBOPT_BACKEND": "kernels"}, [GPU], 1, "nothing: FBOPT_BACKEND asks for the CUDA"),
        ({"FBOPT_CUDA": "0"}, [GPU], 0, "plain torch, as FBOPT_CUDA asks"),
        ({"FBOPT_BACKEND": "reference"}, [GPU], 0, "plain torch, as FBOPT_BACKEND asks"),
        ({"FBOPT_CUDA": "yes"}, [], 1, "FBOPT_CUDA is 'yes'"),
        ({"FBOPT_BACKEND": "kernels"}, [], 0, None),
    ],
)
def test_no_toolkit(variables, gpus, status, on_cuda, capsys, monkeypatch):
    monkeypatch.setattr(cuda, "toolkit", fail)
    see(monkeypatch, *gpus)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found, report = examine(capsys)
    assert found == status
    assert report.get("on CUDA", "None").startswith(str(on_cuda))
    looked_for = variables.get("FBOPT_CUDA") != "0" and (gpus or variables == {"FBOPT_CUDA": "1"})
    assert ("toolkit: install it" in report["to do"]) == bool(looked_for)
    assert ("unset it" in report["to do"]) == (variables == {"FBOPT_CUDA": "yes"})


@pytest.mark.parametrize(
    ("asked", "status", "in_use"),
    [
        (None, 0, "plain torch, as the kernels cannot be compiled"),
        ("reference", 0, "plain torch, as FBOPT_BACKEND asks"),
        ("kernels", 1, "nothing: FBOPT_BACKEND asks for the kernels"),
        ("cuda", 1, "FBOPT_BACKEND is 'cuda'"),
    ],
)
def test_no_compiler(asked, status, in_use, capsys, monkeypatch):
    lack_a_compiler(monkeypatch)
    if asked:
        monkeypatch.setenv("FBOPT_BACKEND", asked)
    found, report = examine(capsys)
    assert (found, report["in use"]) == (status, in_use)
    assert report["compiler"] == "no C++ compiler"
    assert "compiler: install one" in report["to do"]
    assert ("unset" in report["to do"]) == (status == 1)


def warn():
    warnings.warn("The NVIDIA driver is too old\nand more", UserWarning, stacklevel=1)
    return False


@pytest.mark.parametrize(
    ("torch_cuda", "available", "line", "advice"),
    [
        ("13.0", warn, "none that torch can use (The NVIDIA driver is too old)", "GPU: update"),
        (None, bool, "one that torch, built without CUDA, does not use", "GPU: install a torch"),
        ("13.0", bool, "none that torch sees", "nothing"),
    ],
)
def test_a_gpu_that_torch_does_not_see(
    torch_cuda, available, line, advice, capsys, monkeypatch, tmp_path
):
    """It is told and advised on, and stops nothing."""
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    (tmp_path / "driver").touch()
    status, report = examine(capsys)
    assert status == 0 and "on CUDA" not in report
    assert report["GPU"] == line and report["to do"].startswith(advice)


def test_torch_is_missing_from_the_command_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')\n")
    process = subprocess.run(
        [sys.executable, "-m", "fbopt.cli", "doctor"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and process.stderr == ""
    assert "does not import (no torch today)" in process.stdout
    assert "torch: pip install 'torch>=2.10'" in process.stdout


@pytest.mark.parametrize(
    ("what", "spoil", "advice"),
    [
        ("torch", lambda m: m.setattr(torch, "__version__", "2.9.1"), "pip install 'torch>=2.10'"),
        ("pybind11", lambda m: m.setitem(sys.modules, "pybind11", None), "pip install pybind11"),
        ("compiler", lambda m: m.setattr(compiler, "find_headers", fail), "install it"),
        ("GPU", lambda m: m.setattr("torch.cuda.is_available", broken), "mend this"),
        ("processor", lambda m: m.setenv("MAX_JOBS", "all"), "set MAX_JOBS to a positive number"),
    ],
)
def test_each_broken_part_is_a_line_with_advice(what, spoil, advice, capsys, monkeypatch):
    spoil(monkeypatch)
    _, report = examine(capsys)
    (line,) = [line for line in report["to do"].splitlines() if line.startswith(f"{what}: ")]
    assert advice in line
