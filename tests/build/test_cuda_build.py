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

from fbopt._build import compiler, cuda, load, ninja
from fbopt._build.compiler import BuildError
from fbopt._ops import dispatch

ROOT = Path(load.__file__).resolve().parents[2]
ARCHITECTURES = ("8.0", "9.0")
ASKED = {
    "FBOPT_CUDA": "1",
    "FBOPT_BACKEND": "kernels",
    "TORCH_CUDA_ARCH_LIST": ";".join(ARCHITECTURES),
    # Every symbol has to be there: the CUDA runtime's are in what torch has loaded.
    "LD_BIND_NOW": "1",
}
LOAD = """import json, os
import torch
from fbopt._build import load
from fbopt._ops import dispatch
load.kernels()
os.environ["FBOPT_WERROR"] = "1"
module = load.cuda_kernels()
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({
    "file": module.__file__,
    "found": str(load.find_cuda()),
    "cuda": module.cuda_version,
    "architectures": module.architectures,
    "ops": [name for name in dispatch.NAMES if has(f"fbopt::{name}", "CUDA")],
    "initialized": torch.cuda.is_initialized(),
}))
"""
# A product and a sum that the compiler may not contract into one operation.
PRODUCT = "__global__ void f(float* x, float a) { x[0] = x[1] * a + x[2]; }\n"


@pytest.fixture(scope="module")
def toolkit():
    try:
        return cuda.toolkit()
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
    assert ".".join(map(str, loaded["cuda"])) == toolkit.release
    assert loaded["architectures"] == ";".join(ARCHITECTURES)
    assert loaded["file"] == loaded["found"]
    assert not loaded["initialized"]


def log_of(library):
    return library.with_name(f"{library.name.split('.')[0]}.log").read_text()


def resources(log):
    """For each architecture its kernels, and for each of those what ptxas says it takes."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    found = {}
    for kernel, architecture, *numbers in re.findall(pattern, log, re.S):
        found.setdefault(architecture, {})[kernel] = [*map(int, numbers)]
    return found


@pytest.mark.slow
def test_no_kernel_spills(loaded):
    report = resources(log_of(Path(loaded["file"])))
    assert set(report) == {name.replace(".", "") for name in ARCHITECTURES}
    names = [set(kernels) for kernels in report.values()]
    assert names[0] == names[1] and len(names[0]) >= len(dispatch.NAMES)
    spilling = [k for kernels in report.values() for k, numbers in kernels.items() if any(numbers)]
    assert not spilling


@pytest.fixture
def recipe(tmp_path):
    """A recipe with one small .cu file, by a toolkit that need not be there."""
    (tmp_path / "small.cu").write_text("__global__ void twice(float* x) { *x *= 2; }\n")
    tools = cuda.Toolkit(Path("/nonesuch/bin/nvcc"), "13.0", (Path("/nonesuch/include"),))
    cpp = compiler.Toolchain(("/bin/ccache", "/bin/c++", "-m64"), ("-Werror",), "")
    return ninja.Recipe("small", "a small one", (tmp_path / "small.cu",), cpp, tools, ("8.0",))


@pytest.mark.parametrize("change", ["header", "nvcc", "release", "architectures", "flags"])
def test_the_key_follows(change, recipe, monkeypatch):
    before = recipe.stem()
    assert recipe.stem() == before
    if change == "header":
        recipe.sources[0].with_suffix(".cuh").write_text("// new\n")
    elif change == "flags":
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    elif change == "architectures":
        recipe = dataclasses.replace(recipe, architectures=("9.0",))
    else:
        tools = dataclasses.replace(recipe.toolkit, **{change: "another"})
        recipe = dataclasses.replace(recipe, toolkit=tools)
    assert recipe.stem() != before


def test_nvcc_gets_the_compiler_itself(recipe):
    script = recipe.script()
    assert " -ccbin /bin/c++ " in script and "rpath" not in script
    assert " -Werror all-warnings -Xcompiler=-Werror" in script


def test_odd_paths(toolkit, recipe, monkeypatch, tmp_path):
    # No dollar sign: nvcc itself hands paths to a shell.
    source = tmp_path / "it's a folder: of 'sorts'" / "small.cu"
    source.parent.mkdir()
    source.write_text(PRODUCT)
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(source.parent / "cache"))
    tools = compiler.toolchain("default")
    recipe = dataclasses.replace(recipe, sources=(source,), tools=tools, toolkit=toolkit)
    assert "spill" in log_of(ninja.build(recipe))
    source.write_text("__global__ void f() { forty_two(); }\n")
    with pytest.raises(BuildError, match=r"(?s)nvcc .* failed:.*forty_two.*read "):
        ninja.build(recipe)


def test_products_are_rounded_before_they_are_added(toolkit, tmp_path):
    (tmp_path / "small.cu").write_text(PRODUCT)
    command = [toolkit.nvcc, *ninja.NVCC_FLAGS, "-ptx", "-o", "small.ptx", "small.cu"]
    command += ["-ccbin", compiler.toolchain("default").program]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assembly = (tmp_path / "small.ptx").read_text()
    assert "mul.rn.f32" in assembly and "add.rn.f32" in assembly and "fma" not in assembly
