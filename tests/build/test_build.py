"""Building and caching a library, loading it, and the choice of back end; on tiny libraries."""

import ctypes
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fbopt._build import cache, compiler, cuda, load, wheel
from fbopt._build.compiler import BuildError

ROOT = Path(load.__file__).resolve().parents[2]
VARIABLES = ("FBOPT_BACKEND", "FBOPT_CUDA", "FBOPT_WERROR", "CXX", "CXXFLAGS", "MAX_JOBS")
ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
MODULE = """#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr,
                           nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
BUILD = """import sys
from pathlib import Path
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

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, compiler.COMPILERS)), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """An empty cache, no variables, no kernels loaded; afterwards all is as it was."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("_C", "_cuda"):
        monkeypatch.setitem(sys.modules, f"fbopt._build.{name}", None)
        del sys.modules[f"fbopt._build.{name}"]
    forget()
    yield
    forget()


def forget():
    for function in (load.kernels, load.cuda_kernels):
        function.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "it's a $HOME: of 'sorts'" / "tiny.cpp"
    path.parent.mkdir()
    path.write_text(ANSWER)
    return path


@pytest.fixture
def gate(tmp_path):
    """A compiler that waits at a gate: CXX, a log of compilations, and the file that opens it."""
    folder = tmp_path / "gate"
    folder.mkdir()
    program = folder / "compiler"
    program.write_text(GATED_COMPILER.format(folder=folder, compiler=compiler.find_compiler()[0]))
    program.chmod(0o755)
    yield folder
    (folder / "go").touch()  # lets go of whatever still waits, also when a test fails


def find(source):
    """Return the cached library of a source, if there is one."""
    return cache.cached(cache.cache_folder(), load.recipe("tiny", [source]).stem())


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


def test_import_compiles_nothing_and_is_light(tmp_path):
    program = """
import sys
import fbopt
assert "torch" not in sys.modules
import torch
before = set(sys.modules)
fbopt.FullBatchGD, fbopt.FullBatchClosure
print(*sorted(set(sys.modules) - before))
"""
    out, err = finish(start(program))
    modules = out.split()
    assert {name.split(".")[0] for name in modules} <= {"fbopt", "torch", *sys.stdlib_module_names}
    assert not {"torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"} & set(modules)
    assert not any(name.startswith(("fbopt.train", "fbopt._build._C")) for name in modules)
    assert err == "" and not (tmp_path / "cache").exists()


def test_a_library_is_built_once_in_one_line_and_rebuilt_if_truncated(source, tmp_path, capfd):
    library = load.build("tiny", [source], "a tiny library")
    said = capfd.readouterr().err
    assert said.startswith("fbopt: compiling a tiny library for this machine (")
    assert said.count("\n") == 1 and " done in " in said and str(tmp_path / "cache") in said
    assert load.build("tiny", [source]) == library == find(source)
    assert capfd.readouterr() == ("", "")

    os.truncate(library, 1000)
    assert find(source) is None
    again = load.build("tiny", [source])
    assert ctypes.CDLL(str(again)).answer() == 42
    assert [*again.parent.glob("*.so")] == [again] and not leftovers(again.parent)


CHANGES = {
    "source": lambda patch, source: source.write_text(ANSWER + "\n"),
    "header": lambda patch, source: source.with_name("tiny.h").write_text("\n"),
    "CXXFLAGS": lambda patch, source: patch.setenv("CXXFLAGS", "-O1"),
    "FBOPT_WERROR": lambda patch, source: patch.setenv("FBOPT_WERROR", "1"),
    "torch": lambda patch, source: patch.setattr(torch, "__version__", "3.0"),
    "CUDA": lambda patch, source: patch.setattr(torch.version, "cuda", "99.0"),
    # What -march=native means on another processor.
    "processor": lambda patch, source: patch.setattr(
        load, "toolchain", lambda: dataclasses.replace(compiler.toolchain(), macros="")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_follows(change, source, monkeypatch):
    source.with_name("tiny.h").write_text("")
    before = load.recipe("tiny", [source]).stem()
    assert before == load.recipe("tiny", [source]).stem()
    CHANGES[change](monkeypatch, source)
    assert load.recipe("tiny", [source]).stem() != before


def test_libraries_that_do_not_load_are_replaced(source, monkeypatch, tmp_path):
    """The wheel's stays where it is; the cache's is deleted and built once more."""
    source.write_text(MODULE)
    monkeypatch.setattr(wheel, "FOLDER", tmp_path)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(load, "cpu_recipe", lambda: load.recipe("_C", [source]))
    bundled, folder = tmp_path / "_C.default.so", cache.cache_folder()
    bundled.touch()
    folder.mkdir()
    (folder / "garbage").write_bytes(b"garbage")
    garbage = cache.keep(folder / "garbage", folder, load.cpu_recipe().stem())
    assert load.find_kernels() == bundled
    with pytest.warns(RuntimeWarning, match="does not load") as caught:
        assert Path(load.kernels().__file__).parent == folder
    for path, warning in zip((bundled, garbage), caught, strict=True):
        assert str(path) in str(warning.message) and warning.filename == __file__
    assert bundled.exists() and not garbage.exists()


def test_a_compile_error_is_summed_up_and_logged(source, capfd):
    source.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(BuildError, match="forty_two") as raised:
        load.build("tiny", [source])
    (log,) = cache.cache_folder().glob("*.log")
    assert str(log) in str(raised.value) and "forty_two" in log.read_text()
    assert capfd.readouterr().err.endswith("failed\n")
    assert not leftovers(cache.cache_folder())


def test_a_read_only_cache_gives_way_to_a_private_temporary_one(
    source, tmp_path, monkeypatch, capfd
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = load.build("tiny", [source])
    assert library.parent == tmp_path / f"fbopt-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert f"({tmp_path}/file/cache is not used)" in capfd.readouterr().err


def test_jobs_follow_the_cores_the_memory_and_max_jobs(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)), raising=False)
    pages = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": compiler.BYTES_PER_JOB}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    for words, expected in {"": 10, " 3 ": 3, "99": 10}.items():
        monkeypatch.setenv("MAX_JOBS", words)
        assert compiler.jobs() == expected


def test_processes_that_start_at_once_build_once(source, gate, tmp_path):
    with (tmp_path / "said").open("a") as stderr:
        pair = [start(BUILD, source, stderr, CXX=str(gate / "compiler")) for _ in range(2)]
    # Whoever has the lock is held at the gate until the other one has said that it waits.
    said = (tmp_path / "said").read_text
    wait_for(lambda: "minutes for process" in said(), *pair)
    (gate / "go").touch()
    (first, _), (second, _) = map(finish, pair)
    assert first == second
    assert (gate / "log").read_text().count("compile") == 1
    assert said().count("fbopt: ") == 2 and said().count("done in") == 1


def test_a_build_killed_in_the_middle_stops_nobody(source, gate, tmp_path):
    with start(BUILD, source, CXX=str(gate / "compiler")) as killed:
        wait_for((gate / "log").exists, killed)
        killed.kill()
    assert leftovers(tmp_path / "cache")
    (gate / "go").touch()
    library, said = finish(start(BUILD, source, CXX=str(gate / "compiler")))
    assert ctypes.CDLL(library).answer() == 42
    assert "done in" in said and "waiting" not in said
    assert not leftovers(tmp_path / "cache")


def test_a_tool_that_never_ends_is_told_and_ended(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FBOPT_BUILD_MINUTES", "0.02")
    (program := tmp_path / "compiler").write_text("#!/bin/sh\nsleep 100\n")
    program.chmod(0o755)
    cure = "has not ended after 0.02 minutes; find out what it waits for"
    with pytest.raises(BuildError, match=f"{program} {cure}"):
        compiler.run([str(program)])
    told = f"fbopt: waiting for at most 0.02 minutes for {program}\n"
    assert capfd.readouterr().err == told
    with pytest.raises(BuildError, match=cure):
        compiler.run([str(program)], is_told=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("notes", [True, False])
def test_a_lock_is_waited_for_as_long_as_its_holder_gets_on(tmp_path, monkeypatch, capfd, notes):
    monkeypatch.setenv("FBOPT_WAIT_MINUTES", "0.02")
    tmp_path.chmod(0o700)
    ready, path = threading.Event(), tmp_path / "lock"

    def hold() -> None:
        with cache.lock(path, "holding it") as note:
            ready.set()
            for number in range(20):
                if notes:
                    note(f", at {number} of 20")
                time.sleep(0.15)

    holder = threading.Thread(target=hold)
    holder.start()
    assert ready.wait(60)
    begin = time.monotonic()
    if notes:
        with cache.lock(path, "waiting"):
            assert not holder.is_alive() or time.monotonic() - begin > 1.2
    else:
        who = rf"{path} has been locked for 0\.02 minutes by process {os.getpid()} on"
        told = f"{who}.* is waiting; stop that process"
        with pytest.raises(BuildError, match=told), cache.lock(path, "waiting"):
            pytest.fail("locked it twice")
    holder.join()
    assert "fbopt: waiting for at most 0.02 minutes for process" in capfd.readouterr().err


def break_sources(patch, path):
    (path / "broken.cpp").write_text("broken\n")
    patch.setattr(load, "CSRC", path)


CAUSES = {
    r"no C\+\+ compiler.*apt install g\+\+": lambda patch, path: patch.setenv("PATH", str(path)),
    "CXX names 'no', not found on the PATH": lambda patch, path: patch.setenv("CXX", "no -x"),
    r"does not compile C\+\+20.*; update": lambda patch, path: patch.setenv("CXXFLAGS", "--no"),
    "no ninja; pip install ninja": lambda patch, path: patch.setitem(sys.modules, "ninja", None),
    "MAX_JOBS is 'x'; set MAX_JOBS to a": lambda patch, path: patch.setenv("MAX_JOBS", "x"),
    "failed:.*broken.*; read .*/cache/.*log": break_sources,
}


@pytest.mark.parametrize("message", CAUSES)
def test_what_prevents_a_build_is_one_warning_or_an_error(message, monkeypatch, tmp_path):
    CAUSES[message](monkeypatch, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load.kernels() is None
        assert load.kernels() is None and load.backend() == "reference"
    (warning,) = caught
    assert warning.category is RuntimeWarning and warning.filename == __file__
    assert re.search(f"(?s)falls back to plain torch, .*{message}", str(warning.message))

    load.kernels.cache_clear()
    monkeypatch.setenv("FBOPT_BACKEND", "kernels")
    with pytest.raises(RuntimeError, match="(?s)FBOPT_BACKEND asks for the kernels.*" + message):
        load.kernels()


def test_reference_on_request_looks_for_nothing(monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FBOPT_BACKEND", "reference")
    assert load.kernels() is None and load.backend() == "reference"
    assert not recwarn and not (tmp_path / "cache").exists()
    monkeypatch.setenv("FBOPT_BACKEND", "cuda")
    load.kernels.cache_clear()
    with pytest.raises(ValueError, match="'cuda'; set it to kernels or reference"):
        load.backend()


@pytest.mark.slow
def test_the_kernels_of_this_very_tree(monkeypatch):
    monkeypatch.delenv("FBOPT_CACHE_DIR")
    program = """
from fbopt._build import load
module = load.kernels()
assert module is load.kernels() and load.backend() == "kernels"
assert str(load.find_kernels()) == module.__file__
print(module.compiler, module.cxx_standard, *module.torch_target)
"""
    out, _ = finish(start(program, FBOPT_BACKEND="kernels"))
    assert out == f"{compiler.toolchain().name} 202002 2 10"


def test_without_a_toolkit_cuda_tensors_get_plain_torch(monkeypatch):
    def no_toolkit():
        raise BuildError("no CUDA toolkit", "install one")

    monkeypatch.setenv("FBOPT_CUDA", "1")
    monkeypatch.setattr(cuda, "toolkit", no_toolkit)
    monkeypatch.setattr(load, "kernels", functools.cache(lambda: ModuleType("_C")))
    message = "fbopt falls back to plain torch on CUDA tensors: no CUDA toolkit; install one"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert load.cuda_kernels() is None and load.cuda_kernels() is None
    assert len(caught) == 1 and caught[0].filename == __file__
    load.cuda_kernels.cache_clear()
    monkeypatch.setenv("FBOPT_BACKEND", "kernels")
    with pytest.raises(BuildError, match="FBOPT_BACKEND asks for the kernels, but: no CUDA"):
        load.cuda_kernels()
