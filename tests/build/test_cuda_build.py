"""The CUDA kernels compile, link and load without a GPU; every op is among them, none spills."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fbopt._build import (
    compiler as _toolchain,
    library as _library,
    load as _build,
    recipe as _recipe,
    toolkit as _toolkit,
)
from fbopt._ops import dispatch
from fbopt._build.compiler import BuildError

ROOT = Path(_build.__file__).resolve().parents[2]
ARCHITECTURES = ("8.0", "9.0")
ASKED = {
    "FBOPT_CUDA": "1",
    "FBOPT_BACKEND": "kernels",
    "FBOPT_WERROR": "1",
    "TORCH_CUDA_ARCH_LIST": ";".join(ARCHITECTURES),
}
LOAD = """import json, sys
import torch
from fbopt._build import load as _build
from fbopt._ops import dispatch
module = _build.cuda_kernels()
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({
    "file": module.__file__,
    "found": str(_build.find_cuda()),
    "cuda": module.cuda_version,
    "architectures": module.architectures,
    "ops": [name for name in dispatch.NAMES if has(f"fbopt::{name}", "CUDA")],
    "initialized": torch.cuda.is_initialized(),
}))
"""
# A product and a sum that the compiler may not make one.
PRODUCT = "__global__ void f(float* x, float a) { x[0] = x[1] * a + x[2]; }\n"


@pytest.fixture(scope="module")
def toolkit():
    try:
        _toolchain.find_compiler()
        return _toolkit.toolkit()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(toolkit):
    """What a fresh process says of the CUDA kernels it has compiled and loaded."""
    process = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**os.environ, "PYTHONPATH": str(ROOT), **ASKED},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
def test_every_op_has_a_cuda_implementation(loaded, toolkit):
    assert loaded["ops"] == list(dispatch.NAMES)
    assert tuple(loaded["cuda"]) == _toolkit.version
    assert loaded["architectures"] == ";".join(ARCHITECTURES)
    assert loaded["file"] == loaded["found"]
    assert not loaded["initialized"]


def log_of(library):
    return _library.with_name(f"{_library.name.split('.')[0]}.log").read_text()


def resources(log):
    """For each architecture its kernels, and for each of those what ptxas says it takes."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers"
    )
    found = {}
    for kernel, architecture, *numbers in re.findall(pattern, log, re.S):
        names = ("stack", "spill stores", "spill loads", "registers")
        found.setdefault(architecture, {})[kernel] = dict(
            zip(names, map(int, numbers), strict=True)
        )
    return found


@pytest.mark.slow
def test_no_kernel_spills(loaded):
    report = resources(log_of(Path(loaded["file"])))
    assert set(report) == {name.replace(".", "") for name in ARCHITECTURES}
    kernels = [set(kernels) for kernels in report.values()]
    assert kernels[0] == kernels[1] and len(kernels[0]) >= len(dispatch.NAMES)
    for architecture, kernels in report.items():
        most = max(facts["registers"] for facts in kernels.values())
        print(f"sm_{architecture}: {len(kernels)} kernels, at most {most} registers")
        for kernel, facts in kernels.items():
            assert facts["stack"] == facts["spill stores"] == facts["spill loads"] == 0, kernel


def test_the_report_is_read_rightly():
    log = """[1/2] nvcc -c a.cu
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_80'
ptxas info    : Function properties for _Z1fPf
    32 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""
    facts = {"stack": 32, "spill stores": 8, "spill loads": 12, "registers": 255}
    assert resources(log) == {"80": {"_Z1fPf": facts}}


# --- small files ---------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """A recipe with one small .cu file, by a toolkit that need not be there."""
    source = tmp_path / "source" / "small.cu"
    source.parent.mkdir()
    source.write_text("__global__ void twice(float* x) { *x *= 2; }\n")
    (source.parent / "small.cuh").write_text("")
    home = Path("/nonesuch/cuda")
    include = home / "include"
    tools = _toolkit.Toolkit(home / "bin" / "nvcc", home, include, home / "x", (13, 0), (include,))
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    cpp = _toolchain.Toolchain(
        ("/bin/ccache", "/bin/c++", "-m64"), ("-O3",), "#define __GNUC__ 99\n"
    )
    return _recipe.Recipe("small", "a small one", (source,), cpp, _recipe.Cuda(tools, ("8.0",)))


@pytest.mark.parametrize(
    "change",
    ["header", "source", "nvcc", "version", "architectures", "append", "prepend", "torch", "CXX"],
)
def test_the_key_follows(change, recipe, monkeypatch):
    before, cuda = _recipe.stem(), _recipe.cuda
    assert _recipe.stem() == before
    if change in ("source", "header"):
        end = {"source": ".cu", "header": ".cuh"}[change]
        _recipe.sources[0].with_suffix(end).write_text("// another\n")
    elif change in ("append", "prepend"):
        monkeypatch.setenv(f"NVCC_{change.upper()}_FLAGS", "-lineinfo")
    elif change == "torch":
        monkeypatch.setattr(torch.version, "cuda", "99.0")
    elif change == "CXX":
        tools = dataclasses.replace(_recipe.tools, compiler=("/elsewhere/c++",))
        recipe = dataclasses.replace(recipe, tools=tools)
    elif change == "architectures":
        recipe = dataclasses.replace(recipe, cuda=dataclasses.replace(cuda, architectures=("9.0",)))
    else:
        other = {"nvcc": Path("/elsewhere/nvcc"), "version": (13, 1)}[change]
        tools = dataclasses.replace(cuda.toolkit, **{change: other})
        recipe = dataclasses.replace(recipe, cuda=dataclasses.replace(cuda, toolkit=tools))
    assert _recipe.stem() != before


def test_nvcc_gets_the_compiler_itself(recipe):
    script = _recipe.script()
    assert " -ccbin /bin/c++ " in script and "-gencode" in script
    assert "-Werror" not in script and "rpath" not in script
    strict = dataclasses.replace(_recipe.tools, flags=("-Werror",))
    script = dataclasses.replace(recipe, tools=strict).script()
    assert " -Werror all-warnings -Xcompiler=-Werror" in script


def small(toolkit, folder, text):
    folder.mkdir(parents=True)
    (folder / "small.cu").write_text(text)
    cuda = _recipe.Cuda(toolkit, ("8.0",))
    tools = _toolchain.toolchain("default")
    return _recipe.Recipe("small", "a small one", (folder / "small.cu",), tools, cuda)


def test_odd_paths(toolkit, monkeypatch, tmp_path, capfd):
    # No dollar sign: nvcc itself hands paths to a shell.
    folder = tmp_path / "it's a folder: of 'sorts'"
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(folder / "cache"))
    library = _library.build(small(toolkit, folder / "source", PRODUCT))
    assert (
        _library.exists()
        and "spill" in _library.with_name(f"{_library.name.split('.')[0]}.log").read_text()
    )
    said = capfd.readouterr().err
    assert said.startswith(f"fbopt: compiling a small one (nvcc {_toolkit.release}, ")


def test_a_compile_error_is_summed_up_and_logged(toolkit, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    recipe = small(toolkit, tmp_path / "source", "__global__ void f() { forty_two(); }\n")
    with pytest.raises(BuildError, match=r"(?s)nvcc .* failed:.*forty_two.*read "):
        _library.build(recipe)
    (log,) = (tmp_path / "cache").glob("*.log")
    assert "forty_two" in log.read_text() and capfd.readouterr().err.endswith("failed\n")


def test_products_are_rounded_before_they_are_added(toolkit, tmp_path):
    (tmp_path / "small.cu").write_text(PRODUCT)
    command = [_toolkit.nvcc, *_recipe.NVCC_FLAGS.split(), "-ptx", "-o", "small.ptx", "small.cu"]
    command += ["-ccbin", _toolchain.toolchain("default").bare]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assembly = (tmp_path / "small.ptx").read_text()
    assert "mul.rn.f32" in assembly and "add.rn.f32" in assembly and "fma" not in assembly
