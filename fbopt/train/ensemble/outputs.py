"""The outputs of B networks, whose parameters are rows, for n samples each: (B, classes, n).

Those of multilayer perceptrons by batched matrix products, H ← σ(W H + b) with samples in columns;
those of other networks by torch.func.vmap.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.GELU)


class StackedModel:
    """Networks of one architecture.

    Args:
        model: the architecture, without buffers; its parameters are not used.

    Attributes:
        layout: the names and shapes of the parameters, in the order in which a row holds them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layout = {name: p.shape for name, p in model.named_parameters()}
        self._model = model.to("meta")
        self._sizes = [shape.numel() for shape in self.layout.values()]
        self._is_perceptron = _is_perceptron(model)

    def named(self, rows: Tensor) -> Mapping[str, Tensor]:
        """Rows (…, P) as tensors by the names of the parameters: views of them."""
        parts = rows.split(self._sizes, dim=-1)
        pairs = zip(self.layout.items(), parts, strict=True)
        return {name: part.unflatten(-1, shape) for (name, shape), part in pairs}

    def __call__(self, rows: Tensor, input: Tensor, shared: bool) -> Tensor:
        """The outputs for samples (n, …), which all networks share, or (B, n, …)."""
        if self._is_perceptron:
            return self._perceptron(rows, input, shared)
        dims = (0, None if shared else 0)
        return vmap(self._one, in_dims=dims)(rows, input).transpose(1, 2)

    def _one(self, row: Tensor, input: Tensor) -> Tensor:
        output: Tensor = functional_call(self._model, self.named(row), (input,))
        return output

    def _perceptron(self, rows: Tensor, input: Tensor, shared: bool) -> Tensor:
        parameters, hidden = self.named(rows), input.flatten(1 if shared else 2).mT
        for name, layer in self._model.named_children():
            if isinstance(layer, nn.Linear):
                weight, bias = (parameters[f"{name}.{part}"] for part in ("weight", "bias"))
                hidden = _linear(weight, bias.unsqueeze(2), hidden)
            elif isinstance(layer, ELEMENTWISE):
                hidden = layer(hidden)
        return hidden


def _linear(weight: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """W H + b of every network, (B, out, n), from (B, in, n), or from (in, n) by one product."""
    if hidden.dim() == 3:
        return torch.baddbmm(bias, weight, hidden)
    count, out, inner = weight.shape
    return (weight.reshape(count * out, inner) @ hidden).view(count, out, -1) + bias


def _is_perceptron(model: nn.Module) -> bool:
    """Whether a model is linear layers with biases and functions of single numbers in a row."""
    if not isinstance(model, nn.Sequential) or not isinstance(model[0], nn.Flatten):
        return False
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    known = all(isinstance(layer, (nn.Linear, *ELEMENTWISE)) for layer in model[1:])
    return known and bool(linear) and all(layer.bias is not None for layer in linear)
