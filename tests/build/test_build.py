"""The build: what it compiles, when it does not, what it survives. Mostly on a one-line library."""

import ctypes
import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fbopt._build import (
    cache as _cache,
    compiler as _toolchain,
    library as _library,
    load as _build,
    toolkit as _toolkit,
)
from fbopt._build.compiler import BuildError

ROOT = Path(_build.__file__).resolve().parents[2]
VARIABLES = ("FBOPT_BACKEND", "FBOPT_CUDA", "FBOPT_WERROR", "CXX", "CXXFLAGS", "MAX_JOBS")
ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
MODULE = """#include <Python.h>
static PyModuleDef tiny = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, nullptr, nullptr, nullptr,
                           nullptr, nullptr};
PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&tiny); }
"""
BUILD = """import sys
from pathlib import Path
from types import ModuleType
from fbopt._build.load import build
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
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("_C", "_cuda"):
        monkeypatch.delitem(sys.modules, f"fbopt.{name}", raising=False)
    forget()
    yield
    for name in ("_C", "_cuda", "tiny"):
        sys.modules.pop(f"fbopt.{name}", None)
    forget()


def forget():
    _build.kernels.cache_clear()
    _build.cuda_kernels.cache_clear()


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
    _toolchain.write_text(text)
    _toolchain.chmod(0o755)
    yield folder
    (folder / "go").touch()  # lets go of whatever still waits, also when a test fails


def tiny(source):
    return _build.recipe("tiny", [source], "a tiny library")


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
    assert _build.build("tiny", [source]) == library == _library.find(tiny(source))
    assert capfd.readouterr() == ("", "")
    assert not leftovers(_library.parent)


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
    before = tiny(source).stem()
    assert before == tiny(source).stem()
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
    assert dataclasses.replace(tiny(source), tools=tools).stem() != before


@needs_compiler
def test_a_truncated_library_is_rebuilt(source):
    library = _build.build("tiny", [source])
    os.truncate(library, 1000)
    assert _library.find(tiny(source)) is None
    again = _build.build("tiny", [source])
    assert ctypes.CDLL(str(again)).answer() == 42
    assert [*again.parent.glob("*.so")] == [again]


@needs_compiler
def test_a_library_that_does_not_load_is_rebuilt_once(source):
    source.write_text(MODULE)
    folder = _cache.cache_folder()
    folder.mkdir()
    (folder / "garbage").write_bytes(b"garbage")
    garbage = _cache.keep(folder / "garbage", folder, tiny(source).stem())
    assert _library.find(tiny(source)) == garbage
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
    (log,) = _cache.cache_folder().glob("*.log")
    assert str(log) in str(raised.value) and "forty_two" in log.read_text()
    assert capfd.readouterr().err.endswith("failed\n")
    assert not leftovers(_cache.cache_folder())


@needs_compiler
def test_a_read_only_cache_gives_way_to_a_private_temporary_one(
    source, tmp_path, monkeypatch, capfd
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = _build.build("tiny", [source])
    assert _library.parent == tmp_path / f"fbopt-{os.getuid()}"
    assert _library.parent.stat().st_mode & 0o777 == 0o700
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
    "jobs": ("MAX_JOBS is 'many'", lambda patch, path: patch.setenv("MAX_JOBS", "many")),
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
from fbopt._build import load as _build
module = _build.kernels()
assert module is _build.kernels() and _build.backend() == "kernels"
print(module.compiler, module.cxx_standard, module.instruction_set, *module.torch_target)
"""
    out, _ = finish(start(program, FBOPT_BACKEND="kernels"))
    tools = _toolchain.toolchain()
    assert out == f"{tools.name} 202002 {tools.instruction_set} 2 10"


# --- the CUDA kernels ----------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """What is loaded, by name, in place of being loaded."""
    names = []

    def load(name, *args):
        names.append(name)
        return ModuleType(name)

    monkeypatch.setattr(_build, "_load", load)
    return names


@pytest.mark.parametrize(
    ("cuda", "backend", "gpu", "loaded"),
    [
        (None, None, False, []),
        (None, None, True, ["_C", "_cuda"]),
        ("0", "kernels", True, []),
        ("1", None, False, ["_C", "_cuda"]),
        ("1", "reference", True, []),
    ],
)
def test_cuda_kernels_are_loaded_where_they_are_wanted(
    cuda, backend, gpu, loaded, loads, monkeypatch
):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name, value in (("FBOPT_CUDA", cuda), ("FBOPT_BACKEND", backend)):
        monkeypatch.setenv(name, value) if value else None
    assert (_build.cuda_kernels() is not None) == bool(loaded)
    assert loads == loaded


def no_toolkit():
    raise BuildError("no CUDA toolkit", "install one")


def test_without_a_toolkit_cuda_tensors_get_plain_torch(monkeypatch):
    monkeypatch.setenv("FBOPT_CUDA", "1")
    monkeypatch.setattr(_toolkit, "toolkit", no_toolkit)
    monkeypatch.setattr(_build, "kernels", functools.cache(lambda: ModuleType("_C")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _build.cuda_kernels() is None and _build.cuda_kernels() is None
    (warning,) = caught
    assert str(warning.message) == (
        "fbopt falls back to plain torch on CUDA tensors: no CUDA toolkit; install one"
    )
    assert warning.filename == __file__
    forget()
    monkeypatch.setenv("FBOPT_BACKEND", "kernels")
    with pytest.raises(BuildError, match="FBOPT_BACKEND asks for the kernels, but: no CUDA"):
        _build.cuda_kernels()


@needs_compiler
def test_the_cpu_kernels_ask_nothing_about_cuda(source, monkeypatch):
    for name in ("wanted", "toolkit"):
        monkeypatch.setattr(_toolkit, name, lambda: pytest.fail("this concerns CUDA"))
    source.write_text(MODULE.replace("tiny", "_C"))
    monkeypatch.setattr(_build, "sources", lambda: [source])
    assert _build.find_kernels() is None
    library = Path(_build.kernels().__file__)
    assert library == _build.find_kernels()


def test_sources_belong_to_one_library():
    cpu, cuda = set(_build.sources()), set(_build.cuda_sources())
    assert cpu and cuda and not cpu & cuda
    assert cpu | cuda == {*_build.CSRC.rglob("*.cpp"), *_build.CSRC.rglob("*.cu")}
