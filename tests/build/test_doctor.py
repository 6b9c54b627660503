"""`fbopt doctor`: its lines and advice; it never compiles, and never fails on a broken setup."""

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
BUNDLED = Path("/prebuilt/_C.avx2.so"), Path("/prebuilt/_cuda.so")
PLAIN = "plain torch, as the {}kernels cannot be compiled"
LATER = "the {}kernels, compiled at first use"


def fail(cause="there is none", cure="install it"):
    raise BuildError(cause, cure)


def warn():
    warnings.warn("The NVIDIA driver is too old\nand more", UserWarning, stacklevel=1)
    return False


# What a machine can lack, compared with one that has a compiler, a toolkit, a GPU and no library.
SPOILS = {
    "compiler": lambda patch: patch.setattr(compiler, "toolchain", fail),
    "toolkit": lambda patch: patch.setattr(cuda, "toolkit", fail),
    "GPU": lambda patch: patch.setattr(torch.cuda, "is_available", bool),
    "driver": lambda patch: patch.setattr(torch.cuda, "is_available", warn),
    "pybind11": lambda patch: patch.setitem(sys.modules, "pybind11", None),
    "torch": lambda patch: patch.setattr(torch, "__version__", "2.9.1"),
    "CUDA": lambda patch: patch.setattr(torch.version, "cuda", None),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    for name in ("FBOPT_BACKEND", "FBOPT_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    tools = compiler.Toolchain(("/bin/c++",), (), '#define __VERSION__ "99.1.0"\n')
    toolkit = cuda.Toolkit(Path("/cuda/bin/nvcc"), "13.5", (Path("/cuda/include"),))
    for module, name, value in (
        (ninja, "_compile", lambda *args: pytest.fail("the doctor compiles")),
        (wheel, "FOLDER", Path("/prebuilt")),
        (doctor, "DRIVER", tmp_path),
        (compiler, "find_headers", lambda: "/include"),
        (compiler, "toolchain", lambda *target: tools),
        (load, "toolchain", lambda *target: tools),
        (cuda, "toolkit", lambda: toolkit),
        (cuda, "architectures", lambda tools: ("8.0", "9.0")),
        (torch.version, "cuda", "13.0"),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_name", lambda gpu: "NVIDIA H100"),
    ):
        monkeypatch.setattr(module, name, value)


def examine(capsys, status=0):
    """Return the findings by the name that each line begins with."""
    assert doctor.main() == status
    out, err = capsys.readouterr()
    assert err == "" and "Traceback" not in out
    return {line[2:13].strip(): line[14:] for line in out.splitlines()[1:]}


def test_all_is_well(capsys, tmp_path):
    report = examine(capsys)
    labels = ["Python", "torch", "compiler", "ninja", "pybind11", "processor", "GPU", "toolkit"]
    assert list(report) == [*labels, "cache", "in use", "on CUDA", "to do"]
    assert report["torch"] == f"{torch.__version__}, built with CUDA 13.0"
    assert report["compiler"] == "g++ 99.1.0 (/bin/c++)"
    assert report["processor"].endswith(" files compiled at a time")
    assert report["GPU"] == "1 × NVIDIA H100" and report["cache"] == str(tmp_path / "cache")
    assert report["toolkit"] == "CUDA 13.5 (/cuda/bin/nvcc), for 8.0, 9.0"
    assert report["in use"] == LATER.format("") and report["on CUDA"] == LATER.format("CUDA ")
    assert report["to do"] == "nothing"


@pytest.mark.parametrize(
    ("lacking", "variables", "status", "in_use", "on_cuda", "advice"),
    [
        ("compiler", {}, 0, PLAIN, PLAIN, "compiler: install it"),
        ("compiler", {"FBOPT_BACKEND": "reference"}, 0, "plain torch, as FBOPT_BACK", "", ""),
        ("compiler", {"FBOPT_BACKEND": "kernels"}, 1, "nothing: FBOPT_BACKEND", "", "unset FB"),
        ("toolkit", {}, 0, LATER, PLAIN, "toolkit: install it"),
        ("toolkit GPU", {"FBOPT_CUDA": "1"}, 1, LATER, "nothing: FBOPT_CUDA", "unset FBOPT_"),
        ("toolkit", {"FBOPT_CUDA": "0"}, 0, LATER, "plain torch, as FBOPT_CUDA asks", "nothing"),
        ("", {"FBOPT_CUDA": "x"}, 1, LATER, "FBOPT_CUDA is 'x'", "set it to 1 or 0"),
        ("", {"FBOPT_BACKEND": "x"}, 1, "FBOPT_BACKEND is 'x'", "", "set it to kernels or"),
        ("toolkit GPU", {}, 0, LATER, None, "nothing"),
        ("driver", {}, 0, LATER, None, "GPU: update NVIDIA's driver"),
        ("GPU CUDA", {}, 0, LATER, None, "GPU: install a torch with CUDA"),
        ("pybind11", {}, 0, PLAIN, PLAIN, "pybind11: pip install pybind11"),
        ("torch", {}, 1, None, None, "torch: pip install 'torch>=2.10'"),
        ("", {"MAX_JOBS": "all"}, 0, LATER, LATER, "set MAX_JOBS to a positive number"),
    ],
)  # fmt: skip
def test_what_is_missing(lacking, variables, status, in_use, on_cuda, advice, capsys, monkeypatch):
    for name in lacking.split():
        SPOILS[name](monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    doctor.main()
    out = capsys.readouterr().out
    report = examine(capsys, status)
    for line, text, which in (("in use", in_use, ""), ("on CUDA", on_cuda, "CUDA ")):
        assert (line in report) == (text is not None)
        assert report.get(line, "").startswith((text or "").format(which))
    assert advice in out


def test_a_wheel_needs_neither_compiler_nor_toolkit(capsys, monkeypatch):
    for name in ("compiler", "toolkit"):
        SPOILS[name](monkeypatch)
    monkeypatch.setattr(load, "find_kernels", lambda: BUNDLED[0])
    monkeypatch.setattr(load, "find_cuda", lambda: BUNDLED[1])
    report = examine(capsys)
    assert report["compiler"] == "there is none (not needed)" and report["to do"] == "nothing"
    assert report["in use"] == "the kernels, of the wheel"
    assert report["on CUDA"] == "the CUDA kernels, of the wheel"
    # The CUDA kernels do not come without the others.
    monkeypatch.setattr(load, "find_kernels", lambda: None)
    report = examine(capsys)
    assert (report["in use"], report["on CUDA"]) == (PLAIN.format(""), PLAIN.format("CUDA "))


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
