"""`fbopt doctor`: its lines, its advice, and that nothing broken makes it fail or compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fbopt import _build, _toolchain, doctor

ROOT = Path(doctor.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("FBOPT_BACKEND", "CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(_build, "_compile", lambda *args: pytest.fail("the doctor compiles"))


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
    monkeypatch.setattr(_build, "toolchain", lambda: tools)
    monkeypatch.setattr(_toolchain, "find_headers", lambda: "/include")


def test_all_is_well(capsys, monkeypatch, tmp_path):
    pretend_a_compiler(monkeypatch)
    status, report = examine(capsys)
    assert status == 0 and len(report) == 10
    assert report["torch"].startswith(torch.__version__)
    assert report["compiler"] == "g++ 99.?.? (/bin/c++)"
    assert report["processor"].startswith("avx2, ")
    assert report["cache"] == f"{tmp_path}/cache, without the kernels so far"
    assert report["in use"] == "the kernels, compiled at first use in half a minute"
    assert report["to do"] == "nothing"
    assert not (tmp_path / "cache").exists()


def test_kernels_in_the_cache(capsys, monkeypatch):
    pretend_a_compiler(monkeypatch)
    monkeypatch.setattr(_build, "cached", lambda folder, stem: folder / f"{stem}.so")
    monkeypatch.setenv("FBOPT_BACKEND", "kernels")
    status, report = examine(capsys)
    assert status == 0
    assert report["cache"].endswith("with the kernels for this machine")
    assert report["in use"] == "the kernels, as FBOPT_BACKEND asks"


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
        ("cache", lambda m: m.setenv("FBOPT_CACHE_DIR", "/dev/null/x"), "set FBOPT_CACHE_DIR"),
    ],
)
def test_each_broken_part_is_a_line_with_advice(what, spoil, advice, capsys, monkeypatch):
    pretend_a_compiler(monkeypatch) if what != "Python" else None
    spoil(monkeypatch)
    _, report = examine(capsys)
    (line,) = [line for line in report["to do"].splitlines() if line.startswith(f"{what}: ")]
    assert advice in line


def broken():
    raise OSError("it is\nbroken")
