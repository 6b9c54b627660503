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


def test_the_report_is_read_rightly():
    log = """[1/2] nvcc -c a.cu
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_80'
ptxas info    : Function properties for _Z1fPf
    32 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""
    assert resources(log) == {"80": {"_Z1fPf": [32, 8, 12]}}


# --- small files ---------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """A recipe with one small .cu file, by a toolkit that need not be there."""
    source = tmp_path / "source" / "small.cu"
    source.parent.mkdir()
    source.write_text("__global__ void twice(float* x) { *x *= 2; }\n")
    (source.parent / "small.cuh").write_text("")
    tools = cuda.Toolkit(Path("/nonesuch/bin/nvcc"), "13.0", (Path("/nonesuch/include"),))
    macros = '#define __VERSION__ "99.0"\n'
    cpp = compiler.Toolchain(("/bin/ccache", "/bin/c++", "-m64"), ("-O3",), macros)
    return ninja.Recipe("small", "a small one", (source,), cpp, tools, ("8.0",))


@pytest.mark.parametrize(
    "change", ["header", "source", "nvcc", "release", "architectures", "flags"]
)
def test_the_key_follows(change, recipe, monkeypatch):
    before = recipe.stem()
    assert recipe.stem() == before
    if change in ("source", "header"):
        end = {"source": ".cu", "header": ".cuh"}[change]
        recipe.sources[0].with_suffix(end).write_text("// another\n")
    elif change == "flags":
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    elif change == "architectures":
        recipe = dataclasses.replace(recipe, architectures=("9.0",))
    else:
        other = {"nvcc": Path("/elsewhere/nvcc"), "release": "13.1"}[change]
        tools = dataclasses.replace(recipe.toolkit, **{change: other})
        recipe = dataclasses.replace(recipe, toolkit=tools)
    assert recipe.stem() != before


def test_nvcc_gets_the_compiler_itself(recipe):
    script = recipe.script()
    assert " -ccbin /bin/c++ " in script and "-gencode" in script
    assert "-Werror" not in script and "rpath" not in script
    strict = dataclasses.replace(recipe.tools, flags=("-Werror",))
    script = dataclasses.replace(recipe, tools=strict).script()
    assert " -Werror all-warnings -Xcompiler=-Werror" in script


def small(toolkit, folder, text):
    folder.mkdir(parents=True)
    (folder / "small.cu").write_text(text)
    tools = compiler.toolchain("default")
    return ninja.Recipe("small", "a small one", (folder / "small.cu",), tools, toolkit, ("8.0",))


def test_odd_paths(toolkit, monkeypatch, tmp_path, capfd):
    # No dollar sign: nvcc itself hands paths to a shell.
    folder = tmp_path / "it's a folder: of 'sorts'"
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(folder / "cache"))
    library = ninja.build(small(toolkit, folder / "source", PRODUCT))
    assert library.exists() and "spill" in log_of(library)
    said = capfd.readouterr().err
    assert said.startswith(f"fbopt: compiling a small one (nvcc {toolkit.release}, ")


def test_a_compile_error_is_summed_up_and_logged(toolkit, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("FBOPT_CACHE_DIR", str(tmp_path / "cache"))
    recipe = small(toolkit, tmp_path / "source", "__global__ void f() { forty_two(); }\n")
    with pytest.raises(BuildError, match=r"(?s)nvcc .* failed:.*forty_two.*read "):
        ninja.build(recipe)
    (log,) = (tmp_path / "cache").glob("*.log")
    assert "forty_two" in log.read_text() and capfd.readouterr().err.endswith("failed\n")


def test_products_are_rounded_before_they_are_added(toolkit, tmp_path):
    (tmp_path / "small.cu").write_text(PRODUCT)
    command = [toolkit.nvcc, *ninja.NVCC_FLAGS, "-ptx", "-o", "small.ptx", "small.cu"]
    command += ["-ccbin", compiler.toolchain("default").program]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assembly = (tmp_path / "small.ptx").read_text()
    assert "mul.rn.f32" in assembly and "add.rn.f32" in assembly and "fma" not in assembly
