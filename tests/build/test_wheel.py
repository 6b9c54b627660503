"""Wheels: their content, with a compiler and without, and which of their libraries is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from op_cases import DTYPES, LISTS, cases

from fbopt._build import compiler, cuda, load, wheel
from fbopt._build.compiler import BuildError
from fbopt._ops import dispatch

ROOT = Path(load.__file__).resolve().parents[2]
PACKAGE = ["pyproject.toml", "setup.py", "build_backend.py", "MANIFEST.in", "README.md", "LICENSE"]
VARIABLES = ("FBOPT_BACKEND", "FBOPT_CUDA", "FBOPT_WHEEL", "CXX", "CXXFLAGS", "ATEN_CPU_CAPABILITY")
# Each op on arguments from a file; prints a hash of all the bytes for each.
RUN_OPS = """import hashlib, json, sys
import torch
from fbopt._build import load
from fbopt._ops import dispatch
module, ops, bits = load.kernels(), dispatch.table("cpu"), {}
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
FIND = """import json
from fbopt._build import load
modules = [load.kernels(), load.cuda_kernels()]
print(json.dumps([[m.__file__ for m in modules if m], str(load.find_kernels())]))
"""
MODULE = """#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", nullptr, -1, nullptr, nullptr, nullptr,
                             nullptr, nullptr};
PyMODINIT_FUNC PyInit_NAME() { return PyModule_Create(&module); }
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def needs(find):
    """Skip a test where what it needs is not found."""
    try:
        find()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("capability", "present", "taken"),
    [
        ("AVX512", "avx512 avx2 default", "avx512"),
        ("AVX2", "avx512 avx2 default", "avx2"),
        ("SVE256", "default", "default"),
        ("AVX512", "avx2 default", "avx2"),
        ("AVX2", "avx512", None),
    ],
)
def test_the_widest_library_that_torch_allows(capability, present, taken, monkeypatch, tmp_path):
    monkeypatch.setattr(wheel, "TARGETS", dict.fromkeys(("avx512", "avx2", "default")))
    monkeypatch.setattr(wheel, "FOLDER", tmp_path)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    for target in present.split():
        (tmp_path / f"_C.{target}.so").touch()
    assert wheel.kernels() == (tmp_path / f"_C.{taken}.so" if taken else None)


@pytest.mark.parametrize(
    ("architectures", "torch_cuda", "runs", "does_not"),
    [
        ("8.0", "13.0", "8.0 8.9", "7.5 9.0"),
        ("8.0 9.0", "13.2", "8.6 9.0", "10.0 12.0"),
        ("8.0+PTX", "13.0", "8.0 9.0 12.0", "7.5"),
        ("9.0a+PTX", "13.0", "9.0", "9.1 10.0"),
        ("10.0f", "13.0", "10.0 10.3", "11.0 12.0"),
        ("8.0", "12.8", "", "8.0"),
    ],
)
def test_the_cuda_library_must_fit_torch_and_every_gpu(
    architectures, torch_cuda, runs, does_not, monkeypatch, tmp_path
):
    monkeypatch.setattr(wheel, "FOLDER", tmp_path)
    assert wheel.cuda() is None
    (tmp_path / wheel.CUDA_LIBRARY).touch()
    facts = {"version": "13.0", "architectures": architectures.split()}
    (tmp_path / wheel.CUDA_FACTS).write_text(json.dumps(facts))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    for gpu in (runs + " " + does_not).split():
        gpus = [tuple(map(int, name.split("."))) for name in (*runs.split(), gpu)]
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: len(gpus))
        monkeypatch.setattr("torch.cuda.get_device_capability", gpus.__getitem__)
        assert (wheel.cuda() is not None) == (gpu in runs.split())


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a package is made of, with modules of one line in place of the kernels."""
    folder = copy_checkout(tmp_path / "checkout")
    shutil.rmtree(folder / "csrc")
    (folder / "csrc" / "cuda").mkdir(parents=True)
    (folder / "csrc" / "module.cpp").write_text(MODULE.replace("NAME", "_C"))
    return folder


def copy_checkout(folder):
    pytest.importorskip("setuptools", minversion="77")
    folder.mkdir()
    for name in PACKAGE:
        shutil.copy(ROOT / name, folder)
    for name in ("fbopt", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def bare(tmp_path):
    """The environment of a machine without compiler, with a torch that is not to be imported."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    return {"PYTHONPATH": str(tmp_path / "fake"), "PATH": str(tmp_path / "fake")}


def pip(*arguments, cwd, **environment):
    """Run pip without network; return what it and the build said."""
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--verbose", *map(str, arguments), *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, cwd=cwd, check=True, **streams).stdout


def make(checkout, folder, **environment):
    """Build a wheel into a folder and unpack it there; return it and what was said."""
    folder.mkdir(exist_ok=True)
    said = pip("wheel", "--wheel-dir", folder, checkout, cwd=folder, **environment)
    (made,) = folder.glob("fbopt-*.whl")
    zipfile.ZipFile(made).extractall(folder)
    return made, said


def run(program, *arguments, folder, **environment):
    """Run a program over the installed package on a machine without compilers; parse its JSON."""
    cache = folder / "cache"
    variables = {"PYTHONPATH": folder, "PATH": folder / "none", "FBOPT_CACHE_DIR": cache}
    environment = {**os.environ, "FBOPT_BACKEND": "kernels", **environment}
    process = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment | {name: str(value) for name, value in variables.items()},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0 and not process.stderr, process.stderr
    assert not cache.exists()
    return json.loads(process.stdout)


def test_editable_install_without_torch_or_compiler(checkout, bare, tmp_path):
    prefix = tmp_path / "prefix"
    pip("install", "--ignore-installed", "--prefix", prefix, "-e", checkout, cwd=tmp_path, **bare)
    (script,) = prefix.rglob("bin/fbopt")
    (link,) = prefix.rglob("__editable__*.pth")
    program = "import site, sys; site.addsitedir(sys.argv[1]); import fbopt; print(fbopt.__file__)"
    command = [sys.executable, "-S", "-c", program, str(link.parent)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert script.exists() and found.stdout.strip() == str(checkout / "fbopt" / "__init__.py")
    assert not [*tmp_path.rglob("*.so")]


@pytest.mark.parametrize("asked", [False, True])
def test_a_wheel_of_sources(asked, checkout, bare, tmp_path):
    """Without a compiler, or where FBOPT_WHEEL asks for it; torch is not imported."""
    stale = checkout / "build" / "lib" / "fbopt" / "prebuilt" / "_C.default.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    environment = {"PYTHONPATH": bare["PYTHONPATH"], "FBOPT_WHEEL": "source"} if asked else bare
    made, said = make(checkout, tmp_path / "made", **environment)
    assert "fbopt: this wheel brings no compiled kernels, they are compiled at first use: " in said
    assert ("FBOPT_WHEEL asks for" if asked else "no C++ compiler") in said
    assert made.name.endswith("-py3-none-any.whl")
    assert (tmp_path / "made" / "fbopt" / "csrc" / "module.cpp").exists()
    assert not [*(tmp_path / "made").rglob("*.so")]


def test_an_sdist_makes_the_same_wheel(checkout, bare, tmp_path):
    program = "import build_backend, sys; build_backend.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {**os.environ, **bare}
    subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("fbopt-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheels = [make(f, tmp_path / f"made-{f.name}", **bare)[0] for f in (checkout, unpacked)]
    contents = [set(zipfile.ZipFile(made).namelist()) for made in wheels]
    assert contents[0] == contents[1]


def test_only_wheels_with_kernels_require_torch(monkeypatch):
    pytest.importorskip("setuptools", minversion="77")
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    monkeypatch.setattr(hooks.build_meta, "get_requires_for_build_wheel", lambda settings: ["x"])
    monkeypatch.setattr(hooks, "find_compiler", lambda: ["c++"])
    assert hooks.get_requires_for_build_wheel() == ["x", *hooks.FOR_KERNELS]
    for hook in ("get_requires_for_build_editable", "get_requires_for_build_sdist"):
        assert getattr(hooks, hook) == getattr(hooks.build_meta, hook)
    monkeypatch.setenv("FBOPT_WHEEL", "source")
    assert hooks.get_requires_for_build_wheel() == ["x"]
    monkeypatch.setenv("FBOPT_WHEEL", "binary")
    with pytest.raises(ValueError, match="FBOPT_WHEEL is 'binary'; set it to source, or unset it"):
        hooks.get_requires_for_build_wheel()


def test_a_binary_wheel_needs_no_compiler(checkout, tmp_path):
    needs(compiler.find_compiler)
    folder = tmp_path / "installed"
    made, said = make(checkout, folder, FBOPT_CACHE_DIR=str(tmp_path / "made"))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-" in made.name and "any" not in made.name
    assert said.count("fbopt: compiling") == len(compiler.TARGETS)
    names = {path.name for path in (folder / "fbopt" / "prebuilt").iterdir()}
    assert names == {wheel.CPU_LIBRARY.format(target) for target in compiler.TARGETS}
    (file,), found = run(FIND, folder=folder, ATEN_CPU_CAPABILITY="default")
    assert file == found == str(folder / "fbopt" / "prebuilt" / "_C.default.so")


def test_a_compile_error_means_a_wheel_of_sources_or_none(checkout, tmp_path):
    needs(compiler.find_compiler)
    (checkout / "csrc" / "module.cpp").write_text("broken\n")
    environment = {"FBOPT_CACHE_DIR": str(tmp_path / "cache")}
    made, said = make(checkout, tmp_path / "made", **environment)
    assert made.name.endswith("-py3-none-any.whl")
    assert "this wheel brings no compiled kernels" in said and "broken" in said
    with pytest.raises(subprocess.CalledProcessError):
        make(checkout, tmp_path / "none", FBOPT_BACKEND="kernels", **environment)


@pytest.mark.slow
def test_a_wheel_with_cuda_kernels(checkout, tmp_path):
    needs(cuda.toolkit)
    folder = checkout / "csrc" / "cuda"
    (folder / "module.cpp").write_text(MODULE.replace("NAME", "_cuda"))
    (folder / "kernel.cu").write_text("__global__ void twice(float* x) { *x *= 2; }\n")
    asked = {"FBOPT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    asked["FBOPT_CACHE_DIR"] = str(tmp_path / "cache")
    make(checkout, tmp_path / "made", **asked)
    prebuilt = tmp_path / "made" / "fbopt" / "prebuilt"
    facts = json.loads((prebuilt / wheel.CUDA_FACTS).read_text())
    assert facts["architectures"] == ["8.0", "9.0+PTX"]
    files, _ = run(FIND, folder=tmp_path / "made", FBOPT_CUDA="1")
    assert files[1] == str(prebuilt / wheel.CUDA_LIBRARY)

    with pytest.raises(subprocess.CalledProcessError) as raised:
        make(checkout, tmp_path / "failed", **asked, CUDA_HOME="/nonesuch")
    assert "no CUDA toolkit for" in raised.value.output


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this very tree, unpacked."""
    needs(compiler.find_compiler)
    folder = tmp_path_factory.mktemp("wheel")
    make(copy_checkout(folder / "checkout"), folder / "installed", FBOPT_CUDA="0")
    return folder / "installed"


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(installed, tmp_path):
    torch.save(arguments(), tmp_path / "arguments.pt")
    names = list(compiler.TARGETS)
    allowed = torch.backends.cpu.get_cpu_capability().lower()
    usable = names[names.index(allowed) if allowed in names else -1 :]
    results = {}
    for target in usable:
        chosen = {"ATEN_CPU_CAPABILITY": target}
        result = run(RUN_OPS, tmp_path / "arguments.pt", folder=installed, **chosen)
        assert Path(result["file"]).name == wheel.CPU_LIBRARY.format(target)
        results[result["set"]] = result["bits"]
    first, *rest = results.values()
    assert len(results) == len(usable) and all(bits == first for bits in rest)


def arguments():
    """Every op with each of its options on lists of all sorts, and on extreme values."""
    found = {}
    for name in dispatch.NAMES:
        for dtype in DTYPES:
            for shapes in ("shapes", "large") if dtype == torch.float32 else ("shapes",):
                for number, case in enumerate(cases(name, LISTS[shapes], dtype)):
                    found[f"{name} {dtype} {shapes} {number}"] = (name, *case)
            odd = [extremes(dtype)]
            out = torch.zeros_like(odd[0])
            found[f"perturb_ {dtype} extremes"] = ("perturb_", out, odd, [-odd[0]], 0.1)
            finite = [odd[0][odd[0].isfinite()]]
            scaled = finite, finite, 0.1, 0.01, torch.tensor(3.0, dtype=torch.float64)
            out = torch.zeros_like(finite[0])
            found[f"perturb_adaptive_ {dtype} extremes"] = ("perturb_adaptive_", out, *scaled)
            found[f"clip_ {dtype} extremes"] = ("clip_", odd, torch.tensor(3.0), 1.0)
    # Of a long sum the last bit hides how each square was rounded.
    for seed in range(20):
        short = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found[f"squared_norm of few {seed}"] = ("squared_norm", [short])
        found[f"adaptive_norms of few {seed}"] = ("adaptive_norms", [short.flip(0)], [short], 0.01)
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
