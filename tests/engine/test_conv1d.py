"""Convolutions over one dimension as matrix products, which compiled passes are made of."""

from __future__ import annotations

import pytest
import torch
from at_once import chunked, make, require_same
from torch import nn
from torch.func import grad_and_value, vmap
from torch.profiler import profile

from fbopt._engine import conv1d
from fbopt._engine.conv1d import Conv1dAsProduct

CASES = [
    {},
    {"bias": None},
    {"stride": 2, "padding": 1},
    {"stride": (3,), "padding": (2,), "dilation": (2,)},
    {"padding": 4, "dilation": 3},
]


def operands(bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 11), (5, 3, 3), (5,)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return drawn if bias else drawn[:2]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_torch(case):
    """Values, gradients and products with the Hessian."""
    options = dict(CASES[case])
    given = operands(options.pop("bias", True) is not None)
    found = []
    for function in (torch.conv1d, conv1d.conv1d):
        leaves = [t.clone().requires_grad_() for t in given]
        out = function(*leaves, **options)
        grads = torch.autograd.grad(out.tanh().square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        found.append([out, *grads, *again])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert found[1][0].stride() == found[0][0].stride()


def test_equals_torch_for_chunks_with_weights_of_their_own():
    inputs, weight, bias = operands()
    given = [torch.stack([t, 2 * t, -t]) for t in (weight, bias, inputs)]

    def loss(weight, bias, inputs):
        with Conv1dAsProduct():
            return torch.conv1d(inputs, weight, bias, stride=2, padding=1).tanh().sum()

    grads, losses = vmap(grad_and_value(loss))(*given)
    for k in range(3):
        w, b, x = (t[k].clone().requires_grad_() for t in given)
        expected = torch.conv1d(x, w, b, stride=2, padding=1).tanh().sum()
        expected.backward()
        torch.testing.assert_close((losses[k], grads[k]), (expected.detach(), w.grad))


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"groups": 3}, {"most": 4 * 9 * 9 * 8 - 1}, {"device": "meta"}]
)
def test_others_are_left_to_torch(options, monkeypatch):
    """Among them what has windows of a byte more than the limit."""
    options = dict(options)
    inputs, weight, bias = operands()
    if "most" in options:
        monkeypatch.setattr(conv1d, "MOST_BYTES", options.pop("most"))
    device = options.pop("device", "cpu")
    weight = weight[:3, :1] if "groups" in options else weight
    bias = bias[: len(weight)]
    given = [t.to(device) for t in (inputs, weight, bias)]
    assert conv1d.conv1d(*given, **options) is None


REFUSED = {
    "channels": lambda x, w, b: (x[:, :2], w, b),
    "length": lambda x, w, b: (x[..., :2], w, b),
    "dimensions": lambda x, w, b: (x[0, 0], w, b),
    "bias": lambda x, w, b: (x, w, b[:1]),
    "dtypes": lambda x, w, b: (x.float(), w, b),
    "padding": lambda x, w, b: (x, w, b, 1, -1),
    "dilation": lambda x, w, b: (x, w, b, 1, 0, 0),
    "stride": lambda x, w, b: (x, w, b, 0),
    "strides": lambda x, w, b: (x, w, b, (2, 3)),
    "outputs": lambda x, w, b: (x, w[:0], b[:0]),
    "size": lambda x, w, b: (x, w[..., :0], b),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_an_error_of_torch(case):
    given = REFUSED[case](*operands())
    with pytest.raises(RuntimeError) as expected:
        torch.conv1d(*given)
    with Conv1dAsProduct(), pytest.raises(RuntimeError) as found:
        torch.conv1d(*given)
    assert str(found.value) == str(expected.value)


class Signals(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Unflatten(1, (1, 5)),
            nn.Conv1d(1, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv1d(4, 3, 3, padding=1, padding_mode="circular"),
            nn.Flatten(),
            nn.Linear(9, 3),
        )
        self.double()


@pytest.mark.usefixtures("one_thread")
def test_compiled_passes_are_made_of_them():
    require_same(Signals(), chunked(), 3, method="central", compile=True)
    closure = make(Signals(), chunked(), method="forward", vectorize=3, compile=True)
    closure()  # also compares with passes one by one
    with profile() as seen:
        closure()
    names = [event.key for event in seen.key_averages()]
    assert "aten::bmm" in names and not any("conv" in name for name in names)
