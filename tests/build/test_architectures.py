"""Which GPU architectures are built for, and how nvcc is told."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fbopt._build import architectures as _architectures, compiler as _toolchain, nvcc as _nvcc
from fbopt._build.compiler import BuildError

KNOWN = ("75", "80", "86", "90", "100", "120")
NVCC = """#!/bin/sh
case " $* " in
*" --list-gpu-arch "*) {known} ;;
*code=sm_75a*|*code=sm_90f*) echo "nvcc fatal   : Unsupported gpu architecture" >&2; exit 1 ;;
esac
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No GPU and no list, whatever this machine has."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    see(monkeypatch)
    tools = _toolchain.Toolchain(("/bin/c++",), (), "")
    monkeypatch.setattr(_nvcc, "toolchain", lambda: tools)


@pytest.fixture
def tools(tmp_path):
    return toolkit(tmp_path)


def toolkit(folder, known=KNOWN):
    """A toolkit whose nvcc knows these architectures; it lists them in no order."""
    nvcc = folder / "nvcc"
    lines = " ; ".join(f"echo compute_{number}" for number in reversed(known)) or ":"
    _nvcc.write_text(NVCC.format(known=lines))
    _nvcc.chmod(0o755)
    return _nvcc.Toolkit(nvcc, folder, folder, Path("libcudart.so"), (13, 0), ())


def see(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
        (" ; ", "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
        ("9.0", "9.0"),
        ("8.0;9.0+PTX", "8.0 9.0+PTX"),
        ("9.0 8.0, 8.0;", "9.0 8.0"),
        ("9.0a", "9.0a"),
        ("10.0f;10.0a+PTX", "10.0f 10.0a+PTX"),
        ("Hopper", "9.0+PTX"),
        ("Ampere;Hopper", "8.0 8.6+PTX 9.0+PTX"),
        ("Ampere+PTX", "8.0 8.6+PTX"),
        ("All", "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
        ("Common", "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
    ],
)
def test_the_list_is_read_as_torch_reads_it(asked, expected, tools, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert _architectures.architectures(tools) == tuple(expected.split())


@pytest.mark.parametrize(
    ("asked", "cause", "cure"),
    [
        ("7.0", "has 7.0, which nvcc 13.0 does not know (it knows 7.5, 8.0, 8.6", "correct"),
        ("8.0;Pascal", "has 6.0, which nvcc 13.0 does not know", "correct"),
        ("7.5a", "has 7.5a, which nvcc 13.0 does not know", "correct"),
        ("9.0f+PTX", "has 9.0f+PTX, which nvcc 13.0 does not know", "correct"),
        ("90", "has '90'", "write architectures such as"),
        ("sm_90", "has 'sm_90'", "write architectures such as"),
        ("hopper", "has 'hopper'", "write architectures such as"),
        ("9.0+ptx", "has '9.0+ptx'", "write architectures such as"),
        ("native", "is native, but no GPU is visible", "write architectures such as"),
    ],
)
def test_what_nobody_knows_is_refused(asked, cause, cure, tools, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(BuildError) as caught:
        _architectures.architectures(tools)
    assert f"TORCH_CUDA_ARCH_LIST {cause}" in caught.value.cause
    assert cure in caught.value.cure


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([(9, 0)], "9.0"),
        ([(9, 0), (8, 0), (9, 0)], "8.0 9.0"),
        ([(12, 0), (9, 0)], "9.0 12.0"),
        # Not known: the code for an earlier one, compiled by the driver.
        ([(12, 1)], "12.0+PTX"),
        ([(8, 9)], "8.6+PTX"),
    ],
)
def test_visible_gpus_are_built_for(gpus, expected, tools, monkeypatch):
    see(monkeypatch, *gpus)
    for asked in ("", "native"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        assert _architectures.architectures(tools) == tuple(expected.split())


def test_a_gpu_that_nvcc_knows_no_more(tools, monkeypatch):
    see(monkeypatch, (6, 1))
    with pytest.raises(BuildError, match=r"not the GPU's architecture 6.1; install an older CUDA"):
        _architectures.architectures(tools)


def test_what_is_common_depends_on_nvcc(tmp_path):
    assert _architectures.architectures(toolkit(tmp_path, ["60", "70", "90"])) == ("7.0", "9.0+PTX")
    assert _architectures.architectures(toolkit(tmp_path, ["130", "140"])) == ("14.0+PTX",)


def test_an_nvcc_that_names_none(tmp_path):
    with pytest.raises(BuildError, match="--list-gpu-arch names no architecture"):
        _architectures.architectures(toolkit(tmp_path, []))


def test_flags():
    assert _architectures.gencode(["8.0", "9.0a", "12.0", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize("name", _architectures.NAMES)
def test_names_mean_what_they_mean_to_torch(name, monkeypatch):
    """Torch's own reading is private, and later versions know more names than earlier ones."""
    extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
    try:
        expected = extension._get_cuda_arch_flags()
    except (AttributeError, ValueError) as error:
        pytest.skip(str(error))
    monkeypatch.setattr(_architectures, "_require", lambda *args: None)
    monkeypatch.setattr(_architectures, "known_architectures", lambda tools: ("9.0",))
    found = _architectures.architectures(SimpleNamespace())
    assert sorted(_architectures.gencode(found)) == expected
