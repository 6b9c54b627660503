"""BatchNorm's running statistics as torch keeps them, r <- (1 - m) r + m b for the statistics b of
a pass, around a closure that leaves those of its last call's passes alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def layers(model: nn.Module) -> list[_NormBase]:
    """The layers with running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


@contextlib.contextmanager
def blending(model: nn.Module) -> Iterator[None]:
    """Blend what a closure over one mini-batch leaves with what was there before.

    A closure's statistics are the mean over its chunks: of a mini-batch alone b itself.
    """
    active = [m for m in layers(model) if m.training]
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in active]
    yield
    for layer, olds in zip(active, before, strict=True):
        for now, old in zip((layer.running_mean, layer.running_var), olds, strict=True):
            now.copy_(torch.lerp(old, now, layer.momentum))


class EveryPass:
    """Running statistics of every pass of a step in turn, also at perturbed parameters.

    It is what happens to BatchNorm where nothing takes care of it, as in the authors' release.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = layers(model)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follow the passes within this context, and write the statistics at its end."""
        # A closure changes the layers' momentum while it is at work.
        self._shares = {m: m.momentum for m in self._layers}
        self._before = [(m.running_mean.clone(), m.running_var.clone()) for m in self._layers]
        self.restart()
        hooks = [m.register_forward_pre_hook(self._note) for m in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for layer in self._layers:
            mean, var = self._found[layer]
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)

    def restart(self) -> None:
        """Begin again, as exact sums may do with their visit of the chunks."""
        self._found = dict(zip(self._layers, self._before, strict=True))

    @torch.no_grad()
    def _note(self, layer: _NormBase, inputs: tuple[Any, ...]) -> None:
        if not layer.training:
            return
        # As torch's own, in float32 also where the input is of half precision.
        x: Tensor = inputs[0].detach().to(torch.promote_types(inputs[0].dtype, torch.float32))
        dims = [d for d in range(x.ndim) if d != 1]
        var, mean = torch.var_mean(x, dims)
        share = self._shares[layer]
        olds = self._found[layer]
        self._found[layer] = (
            torch.lerp(olds[0], mean.to(olds[0].dtype), share),
            torch.lerp(olds[1], var.to(olds[1].dtype), share),
        )
