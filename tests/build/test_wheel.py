"""Wheels: what they bring, with a compiler and without, and which of their libraries is taken."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from op_cases import DTYPES, LISTS, cases

from fbopt._build import (
    compiler as _toolchain,
    load as _build,
    toolkit as _toolkit,
    wheel as _prebuilt,
)
from fbopt._ops import dispatch
from fbopt._build.compiler import BuildError

ROOT = Path(_build.__file__).resolve().parents[2]
PACKAGE = ["pyproject.toml", "setup.py", "build_backend.py", "MANIFEST.in", "README.md", "LICENSE"]
VARIABLES = ("FBOPT_BACKEND", "FBOPT_CUDA", "FBOPT_WHEEL", "CXX", "CXXFLAGS", "ATEN_CPU_CAPABILITY")
# Each op on arguments from a file; prints a hash of all the bytes for each.
RUN_OPS = """import hashlib, json, sys
import torch
from fbopt._build import load as _build
from fbopt._ops import dispatch
module, ops, bits = _build.kernels(), dispatch.table("cpu"), {}
def raw(value):
    if isinstance(value, (list, tuple)):
        return b"".join(map(raw, value))
    if not isinstance(value, torch.Tensor):
        return b""
    dense = value.clone(memory_format=torch.contiguous_format).view(-1)
    return dense.view(torch.uint8).numpy().tobytes()
for key, (name, *arguments) in torch.load(sys.argv[1]).items():
    result = getattr(ops, name)(*arguments)
    bits[key] = hashlib.sha256(raw([result, arguments])).hexdigest()
print(json.dumps({"file": module.__file__, "set": module.instruction_set, "bits": bits}))
"""
MODULE = """#include <Python.h>
#ifdef __AVX2__
#define SET "avx2"
#else
#define SET "less"
#endif
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", nullptr, -1, nullptr, nullptr, nullptr,
                             nullptr, nullptr};
PyMODINIT_FUNC PyInit_NAME() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddStringConstant(m, "set", SET);
  return m;
}
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No wishes, and no kernels loaded so far; afterwards all is as it was."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("_C", "_cuda"):
        monkeypatch.delitem(sys.modules, f"fbopt.{name}", raising=False)
    _build.kernels.cache_clear()
    yield
    _build.kernels.cache_clear()


def needs_compiler():
    try:
        _toolchain.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


# --- which of a wheel's libraries is taken -------------------------------------------------------


@pytest.fixture
def prebuilt(monkeypatch, tmp_path):
    """A folder like a wheel's, with empty libraries."""
    monkeypatch.setattr(_prebuilt, "FOLDER", tmp_path)
    for target in _toolchain.targets():
        (tmp_path / _prebuilt.cpu_library(target)).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("capability", "present", "taken"),
    [
        ("AVX512", "avx512 avx2 default", "avx512"),
        ("AVX2", "avx512 avx2 default", "avx2"),
        ("DEFAULT", "avx512 avx2 default", "default"),
        ("NO AVX", "avx512 avx2 default", "default"),
        ("AVX512", "avx2 default", "avx2"),
        ("AVX2", "avx512", None),
        ("AVX512_BF16", "avx512 avx2 default", "default"),
    ],
)
def test_the_widest_library_that_torch_allows(capability, present, taken, monkeypatch, tmp_path):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(_prebuilt, "FOLDER", tmp_path)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    for target in present.split():
        (tmp_path / f"_C.{target}.so").touch()
    assert _prebuilt.kernels() == (tmp_path / f"_C.{taken}.so" if taken else None)


def test_other_processors_have_one_library(monkeypatch, tmp_path):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(_prebuilt, "FOLDER", tmp_path)
    (tmp_path / "_C.default.so").touch()
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "SVE256")
    assert _prebuilt.kernels() == tmp_path / "_C.default.so"


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("8.0", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0)]),
        ("8.0 9.0", [(8, 6), (9, 0)], [(10, 0), (12, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("12.1", [(12, 1)], [(12, 0)]),
        ("", [], [(8, 0)]),
    ],
)
def test_what_runs_on_which_gpu(architectures, runs, does_not):
    for capability in (*runs, *does_not):
        assert _prebuilt.covers(architectures.split(), capability) == (capability in runs)


@pytest.mark.parametrize(
    ("torch_cuda", "gpus", "taken"),
    [
        ("13.0", [(9, 0)], True),
        ("13.2", [(9, 0), (8, 6)], True),
        ("13.0", [], True),
        ("13.0", [(9, 0), (7, 5)], False),
        ("12.8", [(9, 0)], False),
        (None, [], False),
    ],
)
def test_the_cuda_library_must_fit_torch_and_every_gpu(
    torch_cuda, gpus, taken, prebuilt, monkeypatch
):
    assert _prebuilt.cuda() is None
    library = prebuilt / _prebuilt.CUDA_LIBRARY
    library.touch()
    facts = {"version": "13.0", "architectures": ["8.0", "9.0"]}
    (prebuilt / _prebuilt.CUDA_FACTS).write_text(json.dumps(facts))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda gpu: gpus[gpu])
    assert _prebuilt.cuda() == (library if taken else None)
    assert _build.find_cuda() == library if taken else True


def test_a_library_that_does_not_load_gives_way_to_a_compiled_one(prebuilt, monkeypatch):
    assert _build.find_kernels() == _prebuilt.kernels()
    compiled = ModuleType("fbopt._C")
    monkeypatch.setattr(_build, "cpu_recipe", lambda: "recipe")
    monkeypatch.setattr(_build, "_load_built", lambda module, recipe: compiled)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _build.kernels() is compiled and _build.kernels() is compiled
    (warning,) = caught
    assert warning.category is RuntimeWarning and warning.filename == __file__
    assert f"{_prebuilt.kernels()} does not load, so that fbopt compiles anew: " in str(
        warning.message
    )


# --- making them, on small sources ---------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a package is made of, and a torch that must not be imported."""
    folder = tmp_path / "checkout"
    copy_checkout(folder)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    return folder


def copy_checkout(folder):
    pytest.importorskip("setuptools", minversion="77")
    folder.mkdir()
    for name in PACKAGE:
        shutil.copy(ROOT / name, folder)
    for name in ("fbopt", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def pip(*arguments, cwd, **environment):
    """Run pip without network; return what it and the build said."""
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--verbose", *arguments, *options]
    environment = {**os.environ, **environment}
    process = subprocess.run(
        command,
        env=environment,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=540,
    )
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, process.stdout)
    return process.stdout


def without_tools(checkout):
    """The environment of a machine with neither compiler nor torch."""
    fake = str(checkout.parent / "fake")
    return {"PYTHONPATH": fake, "PATH": fake}


def run(program, *arguments, folder, **environment):
    """Run a program over the installed package on a machine without compilers; parse its JSON."""
    (folder / "bin").mkdir(exist_ok=True)
    cache = folder / "cache"
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PATH": str(folder / "bin"),
        "FBOPT_BACKEND": "kernels",
        "FBOPT_CACHE_DIR": str(cache),
        **environment,
    }
    process = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    failed = process.returncode != 0 or process.stderr
    assert not failed, process.stderr
    assert not cache.exists()
    return json.loads(process.stdout)


def test_editable_install_without_torch_or_compiler(checkout, tmp_path):
    pip(
        *("install", "--ignore-installed", "--prefix", tmp_path / "prefix", "-e", checkout),
        cwd=tmp_path,
        **without_tools(checkout),
    )
    (script,) = (tmp_path / "prefix").rglob("bin/fbopt")
    (link,) = (tmp_path / "prefix").rglob("__editable__*.pth")
    program = "import site, sys; site.addsitedir(sys.argv[1]); import importlib.util as u; "
    program += "print(u.find_spec('fbopt').origin)"
    command = [sys.executable, "-S", "-c", program, str(link.parent)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert script.exists() and found.stdout.strip() == str(checkout / "fbopt" / "__init__.py")
    assert not [*tmp_path.rglob("*.so")]


@pytest.mark.parametrize("asked", [None, "source"])
def test_a_wheel_of_sources(asked, checkout, tmp_path):
    for stale in ("csrc/stale.cpp", "prebuilt/_C.default.so", "stale.py"):
        path = checkout / "build" / "lib" / "fbopt" / stale
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    environment = {"PYTHONPATH": str(tmp_path / "fake"), "FBOPT_WHEEL": "source"}
    said = pip(
        *("wheel", "--wheel-dir", tmp_path, checkout),
        cwd=tmp_path,
        **(environment if asked else without_tools(checkout)),
    )
    assert "fbopt: this wheel brings no compiled kernels, they are compiled at first use: " in said
    assert ("FBOPT_WHEEL asks for" if asked else "no C++ compiler") in said
    (wheel,) = tmp_path.glob("fbopt-*-py3-none-any.whl")
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    sources = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*")}
    assert {Path("fbopt") / path for path in sources} == {
        path for path in files if path.parts[:2] == ("fbopt", "csrc")
    }
    assert not [path for path in files if path.suffix == ".so" or path.stem == "stale"]


def test_the_kernels_or_nothing(checkout, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as raised:
        pip(
            *("wheel", "--wheel-dir", tmp_path, checkout),
            cwd=tmp_path,
            **without_tools(checkout),
            FBOPT_BACKEND="kernels",
        )
    assert "no C++ compiler" in raised.value.output
    assert not [*tmp_path.glob("*.whl")]


def test_an_sdist_makes_the_same_wheel(checkout, tmp_path):
    program = "import build_backend, sys; build_backend.build_sdist(sys.argv[1])"
    environment = {**os.environ, **without_tools(checkout)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("fbopt-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    contents = []
    for folder, name in ((checkout, "direct"), (unpacked, "by way of the sdist")):
        pip(
            *("wheel", "--wheel-dir", tmp_path / name, folder),
            cwd=tmp_path,
            **without_tools(checkout),
        )
        (wheel,) = (tmp_path / name).glob("*.whl")
        contents.append(set(zipfile.ZipFile(wheel).namelist()))
    assert contents[0] == contents[1]


def backend():
    pytest.importorskip("setuptools", minversion="77")
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_wheels_with_kernels_need_torch(monkeypatch, tmp_path):
    hooks = backend()
    monkeypatch.setattr(hooks.build_meta, "get_requires_for_build_wheel", lambda settings: ["x"])
    monkeypatch.setattr(_toolchain, "find_compiler", lambda: ["c++"])
    monkeypatch.setattr(hooks, "find_compiler", lambda: ["c++"])
    assert hooks.get_requires_for_build_wheel() == ["x", *hooks.FOR_KERNELS]
    for hook in ("get_requires_for_build_editable", "get_requires_for_build_sdist"):
        assert getattr(hooks, hook) == getattr(hooks.build_meta, hook)
    monkeypatch.setenv("FBOPT_WHEEL", "source")
    assert hooks.get_requires_for_build_wheel() == ["x"]
    monkeypatch.setenv("FBOPT_WHEEL", "binary")
    with pytest.raises(ValueError, match="FBOPT_WHEEL is 'binary'; set it to source, or unset it"):
        hooks.get_requires_for_build_wheel()
    monkeypatch.delenv("FBOPT_WHEEL")
    monkeypatch.setattr(hooks, "find_compiler", no_compiler)
    assert hooks.get_requires_for_build_wheel() == ["x"]


def no_compiler():
    raise BuildError("no C++ compiler", "install one")


@pytest.fixture
def small_checkout(checkout):
    """The package with a module that only says what it is compiled for in place of the kernels."""
    shutil.rmtree(checkout / "csrc")
    (checkout / "csrc" / "cuda").mkdir(parents=True)
    (checkout / "csrc" / "module.cpp").write_text(MODULE.replace("NAME", "_C"))
    return checkout


def install(checkout, folder, **environment):
    """Build a binary wheel and unpack it."""
    said = pip("wheel", "--wheel-dir", folder, checkout, cwd=folder, **environment)
    (wheel,) = folder.glob("fbopt-*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return wheel, said


def test_a_binary_wheel_needs_no_compiler(small_checkout, tmp_path):
    needs_compiler()
    folder = tmp_path / "installed"
    folder.mkdir()
    wheel, said = install(small_checkout, folder, FBOPT_CACHE_DIR=str(tmp_path / "made"))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-" in _prebuilt.name and "any" not in _prebuilt.name
    assert said.count("fbopt: compiling") == len(_toolchain.targets())
    names = {path.name for path in (folder / "fbopt" / "prebuilt").iterdir()}
    assert names == {_prebuilt.cpu_library(target) for target in _toolchain.targets()}
    program = "import json; from fbopt import _build; k = _build.kernels()\n"
    program += "print(json.dumps([k.set, k.__file__, str(_build.find_kernels())]))"
    for target, capability in (("default", "default"), (None, "")):
        chosen = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        instruction_set, file, found = run(program, folder=folder, **chosen)
        assert file == found and Path(file).parent == folder / "fbopt" / "prebuilt"
        if target:
            assert instruction_set == "less" and Path(file).name == _prebuilt.cpu_library(target)


def test_a_broken_compiler_means_a_wheel_of_sources(small_checkout, tmp_path):
    needs_compiler()
    (small_checkout / "csrc" / "module.cpp").write_text("broken\n")
    wheel, said = install(small_checkout, tmp_path, FBOPT_CACHE_DIR=str(tmp_path / "made"))
    assert _prebuilt.name.endswith("-py3-none-any.whl")
    assert "this wheel brings no compiled kernels" in said and "broken" in said


@pytest.mark.slow
def test_a_wheel_with_cuda_kernels(small_checkout, tmp_path):
    needs_compiler()
    with contextlib.suppress(BuildError):
        _toolkit.toolkit()
        cuda = small_checkout / "csrc" / "cuda"
        (cuda / "module.cpp").write_text(MODULE.replace("NAME", "_cuda"))
        (cuda / "kernel.cu").write_text("__global__ void twice(float* x) { *x *= 2; }\n")
        asked = {"FBOPT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
        install(small_checkout, tmp_path, FBOPT_CACHE_DIR=str(tmp_path / "made"), **asked)
        facts = json.loads((tmp_path / "fbopt" / "prebuilt" / _prebuilt.CUDA_FACTS).read_text())
        assert facts["architectures"] == ["8.0", "9.0+PTX"]
        program = "import json; from fbopt import _build; c = _build.cuda_kernels()\n"
        program += "print(json.dumps([c.__file__, str(_build.find_cuda())]))"
        file, found = run(program, folder=tmp_path, FBOPT_CUDA="1")
        assert file == found == str(tmp_path / "fbopt" / "prebuilt" / _prebuilt.CUDA_LIBRARY)
        return
    pytest.skip("no CUDA toolkit")


def test_cuda_that_was_asked_for_and_cannot_be_had_is_an_error(small_checkout, tmp_path):
    needs_compiler()
    asked = {"FBOPT_CUDA": "1", "CUDA_HOME": "/nonesuch"}
    with pytest.raises(subprocess.CalledProcessError) as raised:
        install(small_checkout, tmp_path, FBOPT_CACHE_DIR=str(tmp_path / "made"), **asked)
    assert "BuildError" in raised.value.output


# --- the kernels themselves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this very tree, unpacked."""
    needs_compiler()
    folder = tmp_path_factory.mktemp("wheel")
    copy_checkout(folder / "checkout")
    (folder / "installed").mkdir()
    install(folder / "checkout", folder / "installed", FBOPT_CUDA="0")
    return folder / "installed"


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(installed, tmp_path):
    torch.save(arguments(), tmp_path / "arguments.pt")
    names = list(_toolchain.targets())
    allowed = torch.backends.cpu.get_cpu_capability().lower()
    results = {}
    for target in names[names.index(allowed) if allowed in names else -1 :]:
        result = run(
            RUN_OPS, tmp_path / "arguments.pt", folder=installed, ATEN_CPU_CAPABILITY=target
        )
        assert Path(result["file"]).name == _prebuilt.cpu_library(target)
        results[result["set"]] = result["bits"]
    print("the same bits with", *results)
    assert len(results) == len(names) - names.index(allowed) if allowed in names else 1
    for bits in results.values():
        assert bits == results[result["set"]]


def arguments():
    """Every op with each of its options on lists of all sorts, and on extreme values."""
    found = {}
    for name in dispatch.NAMES:
        for dtype in DTYPES:
            for shapes in ("shapes", "large"):
                for number, case in enumerate(cases(name, LISTS[shapes], dtype)):
                    found[f"{name} {dtype} {shapes} {number}"] = (name, *case)
            odd = [extremes(dtype)]
            out = torch.zeros_like(odd[0])
            found[f"perturb_ {dtype} extremes"] = ("perturb_", out, odd, [-odd[0]], 0.1)
            found[f"clip_ {dtype} extremes"] = ("clip_", odd, torch.tensor(3.0), 1.0)
    # Of a long sum the last bit hides how each square was rounded.
    for seed in range(20):
        short = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found[f"squared_norm of few {seed}"] = ("squared_norm", [short])
    return found


def extremes(dtype):
    """Subnormal, tied, largest, infinite: each sign of each; no NaN, whose bits are no promise."""
    if dtype.itemsize == 2:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        return every[~every.isnan()]
    facts = torch.finfo(dtype)
    some = [0.0, facts.smallest_normal, facts.smallest_normal / 8, facts.eps, 1 + facts.eps]
    some += [facts.max, float("inf"), 1 / 3]
    return torch.tensor(some + [-x for x in some], dtype=dtype).repeat(40)


@pytest.mark.slow
def test_libraries_say_nothing_of_where_they_were_made(installed):
    for library in (installed / "fbopt" / "prebuilt").iterdir():
        content = library.read_bytes()
        for place in (installed.parent, ROOT, Path(torch.__file__).parent, Path(sys.prefix)):
            assert str(place).encode() not in content, library
        if shutil.which("readelf"):
            command = ["readelf", "--dynamic", "--sections", "--wide", str(library)]
            facts = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert "RPATH" not in facts and "RUNPATH" not in facts and ".symtab" not in facts
            assert "libtorch_cpu.so" in facts and "libtorch_python" not in facts
