"""`fbopt doctor`: its lines, its advice, and that nothing broken makes it fail or compile."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fbopt._build import (
    compiler as _toolchain,
    doctor_cuda as _doctor_cuda,
    library as _library,
    load as _build,
    nvcc as _nvcc,
    toolkit as _toolkit,
    wheel as _prebuilt,
)
from fbopt import doctor
from fbopt._build.compiler import BuildError

ROOT = Path(doctor.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No wishes, an empty cache, and no GPU."""
    names = ("FBOPT_BACKEND", "FBOPT_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_VISIBLE_DEVICES")
    for name in (*names, "CXX", "CXXFLAGS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(_library, "_compile", lambda *args: pytest.fail("the doctor compiles"))
    monkeypatch.setattr(_prebuilt, "FOLDER", tmp_path / "prebuilt")
    monkeypatch.setattr(_doctor_cuda, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    see(monkeypatch)


def examine(capsys):
    """The exit status, and the findings by the name that each line begins with."""
    status = doctor.main()
    out, err = capsys.readouterr()
    assert err == "" and "Traceback" not in out
    _, *lines = out.splitlines()
    report = {}
    for line in lines:
        what, found = line[2:13].strip(), line[14:]
        report[what] = f"{report[what]}\n{found}" if what in report else found
    return status, report


def pretend_a_compiler(monkeypatch):
    tools = _toolchain.Toolchain(("/bin/c++",), (), "#define __GNUC__ 99\n#define __AVX2__ 1\n")
    monkeypatch.setattr(_toolchain, "toolchain", lambda: tools)
    monkeypatch.setattr(_build, "toolchain", lambda target: tools)
    monkeypatch.setattr(_toolchain, "find_headers", lambda: "/include")


def pretend_a_toolkit(monkeypatch, nvcc="/bin/nvcc"):
    home, through = Path("/cuda"), "nvcc on the PATH"
    tools = _nvcc.Toolkit(Path(nvcc), home, home, home / "libcudart.so", (13, 5), (), through)
    monkeypatch.setattr(_toolkit, "toolkit", lambda: tools)
    monkeypatch.setattr(_nvcc, "check_host", lambda tools: None)
    monkeypatch.setattr(_toolkit, "architectures", lambda tools: ("8.0", "9.0"))


def see(monkeypatch, *gpus):
    """Let torch see these GPUs, by name and compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: gpus[gpu][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: gpus[gpu][1])


def have(monkeypatch, cpu=None, cuda=None):
    """Let there be these libraries already."""
    monkeypatch.setattr(_build, "find_kernels", lambda: cpu)
    monkeypatch.setattr(_build, "find_cuda", lambda: cuda)


H100 = ("NVIDIA H100", (9, 0))
LATER = "the kernels, compiled at first use in half a minute"


def test_all_is_well(capsys, monkeypatch, tmp_path):
    pretend_a_compiler(monkeypatch)
    monkeypatch.setattr(_build, "find_cuda", lambda: pytest.fail("looks for what nobody wants"))
    status, report = examine(capsys)
    assert status == 0 and len(report) == 10
    assert report["torch"] == f"{torch.__version__}, built with CUDA 13.0"
    assert report["compiler"] == "g++ 99.?.? (/bin/c++)"
    assert report["processor"].startswith("avx2, ")
    assert report["processor"].endswith(" files at a time")
    assert report["GPU"] == "none, so only the CPU part is built, and no CUDA toolkit is missing"
    assert report["cache"] == f"{tmp_path}/cache, without the kernels for this machine so far"
    assert report["in use"] == LATER
    assert report["to do"] == "nothing"
    assert not (tmp_path / "cache").exists()


def test_kernels_in_the_cache(capsys, monkeypatch, tmp_path):
    """What is there already is used, also where a tool is broken that would build it."""
    pretend_a_compiler(monkeypatch)
    have(monkeypatch, cpu=tmp_path / "cache" / "_C.so")
    monkeypatch.setattr(_toolchain, "find_ninja", broken)
    monkeypatch.setenv("FBOPT_BACKEND", "kernels")
    status, report = examine(capsys)
    assert status == 0
    assert report["ninja"] == "it is broken (not needed)"
    assert report["cache"].endswith("cache, with the kernels for this machine")
    assert report["in use"] == "the kernels, as FBOPT_BACKEND asks"
    assert report["to do"] == "nothing"


def test_kernels_in_the_wheel(capsys, monkeypatch, tmp_path):
    """No compiler is missed where nothing is to be compiled."""
    monkeypatch.setenv("PATH", str(tmp_path))
    have(monkeypatch, cpu=tmp_path / "prebuilt" / "_C.avx2.so")
    status, report = examine(capsys)
    assert status == 0
    assert report["compiler"] == "no C++ compiler (tried c++, g++, clang++) (not needed)"
    assert report["cache"] == f"{tmp_path}/cache, not used"
    assert report["in use"] == "the kernels, as the wheel brings them"
    assert report["to do"] == "nothing"


def test_a_gpu_and_a_toolkit(capsys, monkeypatch, tmp_path):
    pretend_a_compiler(monkeypatch)
    pretend_a_toolkit(monkeypatch)
    see(monkeypatch, H100, ("NVIDIA A100", (8, 0)), H100)
    have(monkeypatch, cpu=tmp_path / "cache" / "_C.so")
    (tmp_path / "driver").write_text("NVRM version: NVIDIA UNIX x86_64  580.65.06  Sun\nGCC: 12\n")
    status, report = examine(capsys)
    assert status == 0 and len(report) == 13
    assert report["GPU"] == "2 × NVIDIA H100 (9.0), NVIDIA A100 (8.0), driver 580.65.06"
    found = "found through nvcc on the PATH (/bin/nvcc); torch has 13.0"
    assert report["toolkit"] == f"CUDA 13.5 in /cuda, {found}"
    assert report["built for"] == "8.0, 9.0, as the visible GPUs are"
    held = "with the kernels for this machine, without the CUDA kernels so far"
    assert report["cache"] == f"{tmp_path}/cache, {held}"
    assert report["in use"] == "the kernels"
    assert report["on CUDA"] == "the CUDA kernels, compiled at first use in some minutes"
    assert report["to do"] == "nothing"


def test_a_gpu_and_a_wheel_for_it(capsys, monkeypatch, tmp_path):
    """Neither compiler nor toolkit is missed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    see(monkeypatch, H100)
    folder = tmp_path / "prebuilt"
    have(monkeypatch, cpu=folder / "_C.avx2.so", cuda=folder / "_cuda.so")
    status, report = examine(capsys)
    assert status == 0 and report["to do"] == "nothing"
    assert report["on CUDA"] == "the CUDA kernels, as the wheel brings them"


def test_a_gpu_and_a_wheel_without_cuda(capsys, monkeypatch, tmp_path):
    """The CPU kernels are used; what the CUDA kernels need is told."""
    monkeypatch.setenv("PATH", str(tmp_path))
    see(monkeypatch, H100)
    have(monkeypatch, cpu=tmp_path / "prebuilt" / "_C.avx2.so")
    status, report = examine(capsys)
    assert status == 0
    assert report["in use"] == "the kernels, as the wheel brings them"
    assert report["on CUDA"] == "plain torch, as the CUDA kernels cannot be compiled"
    assert "compiler: install one" in report["to do"] and "toolkit" not in report


def test_cuda_kernels_do_not_come_without_the_others(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    see(monkeypatch, H100)
    have(monkeypatch, cuda=tmp_path / "prebuilt" / "_cuda.so")
    _, report = examine(capsys)
    assert report["in use"] == "plain torch, as the kernels cannot be compiled"
    assert report["on CUDA"] == "plain torch, as the CUDA kernels cannot be compiled"


@pytest.mark.parametrize(
    ("variables", "gpus", "status", "on_cuda"),
    [
        ({}, [H100], 0, "plain torch, as the CUDA kernels cannot be compiled"),
        ({"FBOPT_CUDA": "1"}, [], 1, "not the CUDA kernels that FBOPT_CUDA asks for"),
        ({"FBOPT_BACKEND": "kernels"}, [H100], 1, "not the CUDA kernels that FBOPT_BACKEND asks"),
        ({"FBOPT_CUDA": "0"}, [H100], 0, "plain torch, as FBOPT_CUDA asks"),
        ({"FBOPT_BACKEND": "reference"}, [H100], 0, "plain torch, as FBOPT_BACKEND asks"),
        ({"FBOPT_CUDA": "yes"}, [], 1, "FBOPT_CUDA is 'yes'"),
        ({"FBOPT_BACKEND": "kernels"}, [], 0, None),
    ],
)
def test_no_toolkit(variables, gpus, status, on_cuda, capsys, monkeypatch):
    pretend_a_compiler(monkeypatch)
    monkeypatch.setattr(_toolkit, "toolkit", no_toolkit)
    see(monkeypatch, *gpus)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found, report = examine(capsys)
    assert found == status
    assert report.get("on CUDA", "None").startswith(str(on_cuda))
    looked_for = variables.get("FBOPT_CUDA") != "0" and (gpus or variables == {"FBOPT_CUDA": "1"})
    assert ("toolkit: install it" in report["to do"]) == bool(looked_for)
    assert ("unset it" in report["to do"]) == (variables == {"FBOPT_CUDA": "yes"})


@pytest.mark.parametrize("asked", [False, True])
def test_no_gpu_but_fbopt_cuda(asked, capsys, monkeypatch):
    pretend_a_compiler(monkeypatch)
    pretend_a_toolkit(monkeypatch, nvcc="/cuda/bin/nvcc")
    monkeypatch.setenv("FBOPT_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0" if asked else "")
    status, report = examine(capsys)
    assert status == 0
    assert report["GPU"] == "none; the CUDA kernels are built all the same, as FBOPT_CUDA asks"
    assert report["toolkit"] == "CUDA 13.5 in /cuda, found through nvcc on the PATH; torch has 13.0"
    why = ", as TORCH_CUDA_ARCH_LIST asks" if asked else ": the usual ones, as no GPU is visible"
    assert report["built for"] == f"8.0, 9.0{why}"


@pytest.mark.parametrize(
    ("part", "name"), [(_nvcc, "check_host"), (_toolkit, "architectures"), (_toolkit, "toolkit")]
)
def test_a_part_of_the_toolkit_does_not_work(part, name, capsys, monkeypatch):
    pretend_a_compiler(monkeypatch)
    pretend_a_toolkit(monkeypatch)
    see(monkeypatch, H100)
    monkeypatch.setattr(part, name, no_toolkit)
    status, report = examine(capsys)
    what = "built for" if name == "architectures" else "toolkit"
    assert status == 0
    assert report[what] == "there is none" and f"{what}: install it" in report["to do"]
    assert report["on CUDA"] == "plain torch, as the CUDA kernels cannot be compiled"


def warn(*args):
    warnings.warn("The NVIDIA driver is too old\nand more", UserWarning, stacklevel=1)
    return False


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "visible", "available", "line", "advice"),
    [
        (
            True,
            "13.0",
            None,
            warn,
            "none that torch can use (The NVIDIA driver is too",
            "GPU: update",
        ),
        (
            True,
            "13.0",
            None,
            bool,
            "none that torch sees, driver 580.65.06",
            "GPU: see what nvidia-smi",
        ),
        (
            True,
            None,
            None,
            bool,
            "there is one, driver 580.65.06, but torch",
            "GPU: install a torch",
        ),
        (True, "13.0", "", bool, "none, so only the CPU part is built", "nothing"),
        (False, None, None, bool, "none, so only the CPU part is built", "nothing"),
    ],
)
def test_a_gpu_that_torch_does_not_see(
    driver, torch_cuda, visible, available, line, advice, capsys, monkeypatch, tmp_path
):
    """It is told and advised on, and stops nothing."""
    pretend_a_compiler(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if driver:
        (tmp_path / "driver").write_text("NVRM version: NVIDIA UNIX x86_64  580.65.06  Sun Jul\n")
    status, report = examine(capsys)
    assert status == 0 and report["in use"] == LATER and "on CUDA" not in report
    assert report["GPU"].startswith(line)
    assert report["to do"].startswith(advice)


@pytest.mark.parametrize(
    ("asked", "status", "in_use"),
    [
        (None, 0, "plain torch, as the kernels cannot be compiled"),
        ("reference", 0, "plain torch, as FBOPT_BACKEND asks"),
        ("kernels", 1, "nothing: FBOPT_BACKEND asks for the kernels"),
        ("cuda", 1, "FBOPT_BACKEND is 'cuda'"),
    ],
)
def test_no_compiler(asked, status, in_use, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    if asked:
        monkeypatch.setenv("FBOPT_BACKEND", asked)
    found, report = examine(capsys)
    assert (found, report["in use"]) == (status, in_use)
    assert report["compiler"] == "no C++ compiler (tried c++, g++, clang++)"
    assert "compiler: install one (Debian, Ubuntu: apt install g++" in report["to do"]
    assert ("unset" in report["to do"]) == (status == 1)


def test_torch_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    status, report = examine(capsys)
    assert status == 1 and "in use" not in report
    assert report["torch"].startswith("does not import")
    assert "torch: pip install 'torch>=2.10'" in report["to do"]


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


@pytest.mark.parametrize(
    ("what", "spoil", "advice"),
    [
        ("torch", lambda m: m.setattr(torch, "__version__", "2.9.1"), "pip install 'torch>=2.10'"),
        ("Python", lambda m: m.setattr("sysconfig.get_path", lambda name: "/x"), "python3-dev"),
        ("pybind11", lambda m: m.setitem(sys.modules, "pybind11", None), "pip install pybind11"),
        ("ninja", lambda m: m.setattr(_toolchain, "find_ninja", broken), "mend this"),
        ("GPU", lambda m: m.setattr("torch.cuda.is_available", broken), "mend this"),
        ("processor", lambda m: m.setattr("os.cpu_count", broken), "mend this"),
        ("processor", lambda m: m.setenv("MAX_JOBS", "all"), "set MAX_JOBS to a positive number"),
        ("cache", lambda m: m.setenv("FBOPT_CACHE_DIR", "/dev/null/x"), "set FBOPT_CACHE_DIR"),
    ],
)
def test_each_broken_part_is_a_line_with_advice(what, spoil, advice, capsys, monkeypatch):
    pretend_a_compiler(monkeypatch) if what != "Python" else None
    spoil(monkeypatch)
    _, report = examine(capsys)
    (line,) = [line for line in report["to do"].splitlines() if line.startswith(f"{what}: ")]
    assert advice in line


def no_toolkit(*args):
    raise BuildError("there is none", "install it")


def broken():
    raise OSError("it is\nbroken")
