"""FullBatchClosure(compile=True): what is compiled, and how often. With torch.compile's own tracing
and autograd, without its slow code generator.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import compile_fx

from fbopt import FullBatchClosure, GradientPenalty

SAMPLES, CHUNK = 44, 4  # eleven chunks


class Graphs:
    """The backend "aot_eager", which notes what it gets.

    Attributes:
        shapes: of the inputs of every graph; a number that is a symbol is one of these, too.
    """

    def __init__(self) -> None:
        self.shapes: list[list[Any]] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        self.shapes.append([tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def graphs(monkeypatch):
    backend = Graphs()
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda graph, inputs, config_patches: backend(graph, inputs)
    )
    torch.compiler.reset()
    yield backend
    torch.compiler.reset()


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)).double()
    x, y = torch.randn(SAMPLES, 5).double(), torch.randint(3, (SAMPLES,))
    return model, list(zip(x.split(CHUNK), y.split(CHUNK), strict=True))


def grads(model, chunks, **options):
    """The gradient of the second call, which is that of the first."""
    model, found = copy.deepcopy(model), []
    closure = FullBatchClosure(model, F.cross_entropy, chunks, accumulation="exact", **options)
    for _ in range(2):
        torch.manual_seed(1)
        closure()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)
    return found[1]


@pytest.mark.parametrize(("method", "count"), [(None, 4), ("forward", 1), ("central", 4)])
def test_the_same_as_without_a_compiler(graphs, method, count):
    model, chunks = task()
    penalty = method and GradientPenalty(coefficient=0.1, method=method)
    options = {"penalty": penalty, "vectorize": count}
    plain = grads(model, chunks, **options)
    assert not graphs.shapes
    compiled = grads(model, chunks, compile=True, **options)
    torch.testing.assert_close(compiled, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_passes_over_one_chunk_are_compiled_once(graphs, layout):
    """Those at shifted points, too: they are the same function."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)
    model = nn.Sequential(*layers).to(memory_format=layout).double()
    x, y = torch.randn(9, 3, 5, 5).double(), torch.randint(3, (9,))
    chunks = list(zip(x.to(memory_format=layout).split(3), y.split(3), strict=True))
    options = {"penalty": GradientPenalty(coefficient=0.1)}
    compiled = grads(model, chunks, compile=True, **options)
    assert len(graphs.shapes) == 1
    torch.testing.assert_close(compiled, grads(model, chunks, **options), rtol=1e-11, atol=1e-13)


def test_each_kind_of_group_is_compiled_once_and_for_its_own_shapes(graphs):
    """Code for any shape rounds otherwise than code for one: bits would depend on the order."""
    model, chunks = task()
    grads(model, chunks, penalty=GradientPenalty(coefficient=0.1), vectorize=4, compile=True)
    assert all(isinstance(shape, tuple) for shapes in graphs.shapes for shape in shapes)
    counts = Counter(shapes[0][0] for shapes in graphs.shapes if len(shapes[0]) == 3)
    assert counts == {4: 1, 3: 1}  # at shifted points; the chunks are 4, 4 and 3
    assert len(graphs.shapes) == 4
