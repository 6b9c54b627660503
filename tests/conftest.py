"""Fixtures that several test files share, and `bits`, which says whether anything changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Workers of pytest-xdist share the cores; OpenMP reads this once, when torch is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import targets
import torch
from torch import Tensor, nn

from fbopt._build import load
from fbopt._ops import dispatch, reference

BACKENDS = ("kernels", "reference")
TARGETS = ("cpu", "dispatched", "emulated", pytest.param("cuda", marks=pytest.mark.cuda))


# A machine with a GPU may have only what the kernels need.
collect_ignore = [
    path
    for path in Path(__file__).parent.rglob("test_*.py")
    if "from hypothesis" in path.read_text() and not find_spec("hypothesis")
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", params=TARGETS)
def target(request: pytest.FixtureRequest) -> targets.Target:
    """Run a test of ops over every target that this machine has."""
    return targets.target(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test over the compiled kernels and over plain torch."""
    use_backend(request.param, monkeypatch)
    return request.param


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test over the compiled kernels, or skip it."""
    use_backend("kernels", monkeypatch)
    return "kernels"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run a module of small tensors on one thread.

    Beside other work, waiting for a second thread costs far more; and torch's batch_norm rounds
    differently on two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library use one back end; skips where there is no compiler for the kernels."""
    if name == "reference":
        monkeypatch.setattr(dispatch, "table", lambda device_type: reference)
    elif load.backend() != "kernels":
        pytest.skip("no kernels on this machine")


def bits(*things: Any) -> Any:
    """What modules, optimizers, tensors and plain values hold, as something to compare bit for bit.

    Modules give their parameters and buffers with requires_grad and training flags and the momenta
    of their normalisation layers; optimizers their parameters, state and groups.
    """
    return [thing_bits(thing) for thing in things]


def thing_bits(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return tensor_bits(thing)
    if isinstance(thing, nn.Module):
        return module_bits(thing)
    if isinstance(thing, torch.optim.Optimizer):
        held = [p for group in thing.param_groups for p in group["params"]]
        return thing_bits(held), thing_bits(thing.state_dict())
    if isinstance(thing, Mapping):
        return {key: thing_bits(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set):
        return [thing_bits(x) for x in thing]
    return repr(thing)


def tensor_bits(tensor: Tensor) -> tuple:
    """Type, shape, strides, requires_grad and bytes (none for a meta tensor)."""
    facts = (str(tensor.dtype), str(tensor.device), tuple(tensor.shape), tensor.requires_grad)
    plain = tensor.detach()
    if plain.layout != torch.strided:
        return (*facts, tensor_bits(plain.to_dense()))
    if plain.device.type == "meta":
        return (*facts, plain.stride())
    flat = torch.view_as_real(plain) if plain.is_complex() else plain
    raw = flat.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
    return (*facts, plain.stride(), raw)


def module_bits(module: nn.Module) -> dict[str, Any]:
    return {
        "params": {n: tensor_bits(p) for n, p in module.named_parameters()},
        "buffers": {n: tensor_bits(b) for n, b in module.named_buffers()},
        "training": [m.training for m in module.modules()],
        "momenta": [getattr(m, "momentum", None) for m in module.modules()],
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """`--data` of the training program for a tiny set of images."""
    import tiny_runs  # a machine with a GPU may lack what the training program needs

    return tiny_runs.data(tmp_path_factory.mktemp("data"))
