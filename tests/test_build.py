"""The build: what it compiles, when it does not, what it survives. Mostly on a one-line library."""

import ctypes
import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from fbopt import _build, _toolchain
from fbopt._build import BuildError

ROOT = Path(_build.__file__).resolve().parent.parent
ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
MODULE = """#include <Python.h>
static PyModuleDef tiny = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, nullptr, nullptr, nullptr,
                           nullptr, nullptr};
PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&tiny); }
"""
BUILD = """import sys
from pathlib import Path
from fbopt._build import build
print(build("tiny", [Path(sys.argv[1])], "a tiny library"))
"""
# Logs each compilation, and holds it until there is a file named go.
GATED_COMPILER = """#!/bin/sh
case " $* " in *" -c "*)
  echo compile >> "{folder}/log"
  while [ ! -e "{folder}/go" ]; do sleep 0.05; done ;;
esac
exec "{compiler}" "$@"
"""

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in _toolchain.COMPILERS), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """An empty cache, no wishes, and no kernels loaded so far; afterwards all is as it was."""
    for name in ("FBOPT_BACKEND", "CXX", "CXXFLAGS", "MAX_JOBS", "FBOPT_WERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "fbopt._C", raising=False)
    _build.kernels.cache_clear()
    yield
    sys.modules.pop("fbopt.tiny", None)
    _build.kernels.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source" / "tiny.cpp"
    path.parent.mkdir()
    path.write_text(ANSWER)
    return path


@pytest.fixture
def gate(tmp_path):
    """A compiler that waits at a gate: CXX, a count of compilations, and the file that opens it."""
    folder = tmp_path / "gate"
    folder.mkdir()
    compiler = folder / "compiler"
    text = GATED_COMPILER.format(folder=folder, compiler=_toolchain.find_compiler()[0])
    compiler.write_text(text)
    compiler.chmod(0o755)
    yield folder
    (folder / "go").touch()  # lets go of whatever still waits, also when a test fails


def start(program, argument="", stderr=subprocess.PIPE, **environment):
    """Start Python on a program of its own, with this checkout on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", program, str(argument)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def finish(process):
    """Wait for it; return what it printed on either stream."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.strip(), err


def wait_for(condition, *processes):
    """Wait until the condition holds, while the processes live."""
    end = time.monotonic() + 120
    while not condition():
        assert all(process.poll() is None for process in processes), "ended too early"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if ".build-" in path.name]


def no_tools(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


# --- importing ---------------------------------------------------------------------------------


def test_import_compiles_nothing_and_is_light(tmp_path):
    program = """
import sys, time
start = time.perf_counter()
import torch
torch_seconds, before = time.perf_counter() - start, set(sys.modules)
start = time.perf_counter()
import fbopt
fbopt.FullBatchGD, fbopt.FullBatchClosure
print(torch_seconds, time.perf_counter() - start, *sorted(set(sys.modules) - before))
"""
    out, err = finish(start(program))
    torch_seconds, seconds, *modules = out.split()
    print(f"import torch {torch_seconds} s, import fbopt {seconds} s more: {modules}")
    assert {name.split(".")[0] for name in modules} <= {"fbopt", "torch", *sys.stdlib_module_names}
    assert not {"torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"} & set(modules)
    assert not any(name.startswith(("fbopt.train", "fbopt._C")) for name in modules)
    assert err == "" and not (tmp_path / "cache").exists()


# --- building and caching ----------------------------------------------------------------------


@needs_compiler
def test_a_second_build_finds_the_first_and_is_silent(source, tmp_path, capfd):
    library = _build.build("tiny", [source], "a tiny library")
    said = capfd.readouterr().err
    assert said.startswith("fbopt: compiling a tiny library for this machine (")
    assert said.count("\n") == 1 and " done in " in said and str(tmp_path / "cache") in said
    assert ctypes.CDLL(str(library)).answer() == 42
    assert _build.build("tiny", [source]) == library == _build.find("tiny", [source])
    assert capfd.readouterr() == ("", "")
    assert not leftovers(library.parent)


@needs_compiler
def test_odd_paths(tmp_path, monkeypatch):
    folder = tmp_path / "it's a $HOME: of 'sorts'"
    folder.mkdir()
    sources = [folder / "one.cpp", folder / "deeper" / "one.cpp"]
    sources[1].parent.mkdir()
    (folder / "common.h").write_text("extern int value;\n")
    sources[0].write_text('#include "common.h"\n' + ANSWER.replace("42", "value"))
    sources[1].write_text("int value = 41;\n")
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(folder / "cache"))
    assert ctypes.CDLL(str(_build.build("tiny", sources))).answer() == 41


@needs_compiler
@pytest.mark.parametrize(
    "change",
    ["source", "header", "CXXFLAGS", "FBOPT_WERROR", "torch", "CUDA", "pybind11", "CPU", "CXX"],
)
def test_the_key_follows(change, source, monkeypatch):
    header = source.with_name("tiny.h")
    header.write_text("")
    tools = _toolchain.toolchain()
    before = _build.key("tiny", tools, [source])
    assert before == _build.key("tiny", _toolchain.toolchain(), [source])
    if change in ("CXXFLAGS", "FBOPT_WERROR"):
        monkeypatch.setenv(change, {"CXXFLAGS": "-O1", "FBOPT_WERROR": "1"}[change])
        tools = _toolchain.toolchain()
    elif change == "source":
        source.write_text(ANSWER + "\n")
    elif change == "header":
        header.write_text("\n")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0")
    elif change == "CUDA":
        monkeypatch.setattr(torch.version, "cuda", "99.0")
    elif change == "pybind11":
        monkeypatch.setattr(_toolchain.find_pybind11(), "__version__", "0")
    elif change == "CPU":
        tools = dataclasses.replace(tools, macros=tools.macros + "#define __AVX9999__ 1\n")
    elif change == "CXX":
        tools = dataclasses.replace(tools, compiler=("/elsewhere/c++",))
    assert _build.key("tiny", tools, [source]) != before


@needs_compiler
def test_a_truncated_library_is_rebuilt(source):
    library = _build.build("tiny", [source])
    os.truncate(library, 1000)
    assert _build.find("tiny", [source]) is None
    again = _build.build("tiny", [source])
    assert ctypes.CDLL(str(again)).answer() == 42
    assert [*again.parent.glob("*.so")] == [again]


@needs_compiler
def test_a_library_that_does_not_load_is_rebuilt_once(source):
    source.write_text(MODULE)
    folder = _build.cache_folder()
    folder.mkdir()
    stem = _build.key("tiny", _toolchain.toolchain(), [source])
    digest = hashlib.sha256(b"garbage").hexdigest()[:16]
    garbage = folder / f"{stem}.{digest}.so"
    garbage.write_bytes(b"garbage")
    assert _build.find("tiny", [source]) == garbage
    assert _build.load("tiny", [source]).__name__ == "fbopt.tiny"
    assert not garbage.exists()


@needs_compiler
def test_a_library_that_never_loads_is_an_error(source):
    with pytest.raises(BuildError, match="does not load"):
        _build.load("tiny", [source])


@needs_compiler
def test_a_compile_error_is_summed_up_and_logged(source, capfd):
    source.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(BuildError, match="forty_two") as raised:
        _build.build("tiny", [source])
    (log,) = _build.cache_folder().glob("*.log")
    assert str(log) in str(raised.value) and "forty_two" in log.read_text()
    assert capfd.readouterr().err.endswith("failed\n")
    assert not leftovers(_build.cache_folder())


@needs_compiler
def test_a_read_only_cache_gives_way_to_a_private_temporary_one(
    source, tmp_path, monkeypatch, capfd
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = _build.build("tiny", [source])
    assert library.parent == tmp_path / f"fbopt-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert f"({tmp_path}/file/cache is not writable)" in capfd.readouterr().err
    monkeypatch.setattr("os.getuid", lambda: -1)
    with pytest.raises(BuildError, match="another user"):
        _build.build("tiny", [source])


# --- several processes, and dead ones ------------------------------------------------------------


@needs_compiler
def test_processes_that_start_at_once_build_once(source, gate, tmp_path):
    with (tmp_path / "said").open("a") as stderr:
        pair = [start(BUILD, source, stderr, CXX=str(gate / "compiler")) for _ in range(2)]
    # Whoever has the lock is held at the gate until the other one has said that it waits.
    said = (tmp_path / "said").read_text
    wait_for(lambda: "waiting for another process that is compiling" in said(), *pair)
    (gate / "go").touch()
    (first, _), (second, _) = map(finish, pair)
    assert first == second
    assert (gate / "log").read_text().count("compile") == 1
    assert said().count("fbopt: ") == 2 and said().count("done in") == 1


@needs_compiler
def test_a_build_killed_in_the_middle_stops_nobody(source, gate, tmp_path):
    killed = start(BUILD, source, CXX=str(gate / "compiler"))
    wait_for((gate / "log").exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    assert leftovers(tmp_path / "cache")
    (gate / "go").touch()
    library, said = finish(start(BUILD, source, CXX=str(gate / "compiler")))
    assert ctypes.CDLL(library).answer() == 42
    assert "done in" in said and "waiting" not in said
    assert not leftovers(tmp_path / "cache")


# --- which back end ------------------------------------------------------------------------------


def test_no_sources_is_an_error():
    with pytest.raises(BuildError, match="no C\\+\\+ sources"):
        _build.build("tiny", [])


def broken_sources(tmp_path):
    path = tmp_path / "broken.cpp"
    path.write_text("broken\n")
    return [path]


CAUSES = {
    "compiler": ("no C\\+\\+ compiler.*apt install g\\+\\+", no_tools),
    "CXX": (
        "CXX names 'nonesuch', not found on the PATH; correct or unset CXX",
        lambda patch, path: patch.setenv("CXX", "nonesuch -x"),
    ),
    "flags": (
        "does not compile C\\+\\+20.*nonesuch",
        lambda patch, path: patch.setenv("CXXFLAGS", "--nonesuch"),
    ),
    "ninja": (
        "no ninja; pip install ninja",
        lambda patch, path: patch.setattr("shutil.which", only_compilers),
    ),
    "headers": (
        "no Python headers.*apt install python3-dev",
        lambda patch, path: patch.setattr("sysconfig.get_path", lambda name: "/nonesuch"),
    ),
    "pybind11": (
        "no pybind11; pip install pybind11",
        lambda patch, path: patch.setitem(sys.modules, "pybind11", None),
    ),
    "sources": (
        "failed:.*broken",
        lambda patch, path: patch.setattr(_build, "sources", lambda: broken_sources(path)),
    ),
}


def only_compilers(name, path=None, which=shutil.which):
    return None if "ninja" in name else which(name, path=path)


@needs_compiler
@pytest.mark.parametrize("cause", CAUSES)
def test_what_stands_in_the_way_is_one_warning_or_an_error(cause, monkeypatch, tmp_path):
    message, spoil = CAUSES[cause]
    spoil(monkeypatch, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _build.kernels() is None
        assert _build.kernels() is None and _build.backend() == "reference"
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert re.search("(?s)" + message, str(warning.message))

    _build.kernels.cache_clear()
    monkeypatch.setenv("FBOPT_BACKEND", "kernels")
    with pytest.raises(RuntimeError, match="(?s)FBOPT_BACKEND asks for the kernels.*" + message):
        _build.kernels()


def test_reference_on_request_looks_for_nothing(monkeypatch, tmp_path, recwarn):
    no_tools(monkeypatch, tmp_path)
    monkeypatch.setenv("FBOPT_BACKEND", "reference")
    assert _build.kernels() is None and _build.backend() == "reference"
    assert not recwarn and not (tmp_path / "cache").exists()


def test_an_unknown_back_end_is_an_error(monkeypatch):
    monkeypatch.setenv("FBOPT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda'; set it to kernels or reference"):
        _build.backend()


@needs_compiler
@pytest.mark.slow
def test_the_kernels_of_this_very_tree(monkeypatch):
    monkeypatch.delenv("FBOPT_CACHE_DIR")
    program = """
from fbopt import _build
module = _build.kernels()
assert module is _build.kernels() and _build.backend() == "kernels"
print(module.compiler, module.cxx_standard, module.instruction_set, *module.torch_target)
"""
    out, _ = finish(start(program, FBOPT_BACKEND="kernels"))
    tools = _toolchain.toolchain()
    assert out == f"{tools.name} 202002 {tools.instruction_set} 2 10"


# --- installing ----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a package is made of, a torch that must not be imported, and no compiler."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("fbopt", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    return folder


def pip(checkout, *arguments):
    fake = checkout.parent / "fake"
    environment = {**os.environ, "PYTHONPATH": str(fake), "PATH": str(fake)}
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", *arguments, *options]
    subprocess.run(command, env=environment, check=True, cwd=checkout.parent, timeout=240)


def test_editable_install_without_torch_or_compiler(checkout, tmp_path):
    pip(checkout, "install", "--ignore-installed", "--prefix", tmp_path / "prefix", "-e", checkout)
    (script,) = (tmp_path / "prefix").rglob("bin/fbopt")
    (link,) = (tmp_path / "prefix").rglob("__editable__*.pth")
    program = "import site, sys; site.addsitedir(sys.argv[1]); import importlib.util as u; "
    program += "print(u.find_spec('fbopt').origin)"
    command = [sys.executable, "-S", "-c", program, str(link.parent)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert script.exists() and found.stdout.strip() == str(checkout / "fbopt" / "__init__.py")
    assert not [*tmp_path.rglob("*.so")] and not (tmp_path / "cache").exists()


def test_wheel_brings_its_sources(checkout, tmp_path):
    stale = checkout / "build" / "lib" / "fbopt" / "csrc" / "stale.cpp"
    stale.parent.mkdir(parents=True)
    stale.touch()
    pip(checkout, "wheel", "--wheel-dir", tmp_path, checkout)
    (wheel,) = tmp_path.glob("fbopt-*-py3-none-any.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    program = "from fbopt._build import CSRC, sources; print(CSRC, len(sources()))"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    shipped = installed / "fbopt" / "csrc"
    assert process.stdout.split() == [str(shipped), str(len(_build.sources()))]
    files = {path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.*")}
    assert {path.relative_to(shipped) for path in shipped.rglob("*.*")} == files
