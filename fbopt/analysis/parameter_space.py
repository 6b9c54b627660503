"""Parameter vectors: a list of parameters as one 1-D tensor, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ParameterSpace:
    """The vector space of a list of parameters.

    A vector is a 1-D tensor: the parameters one after the other in row-major order, float32
    (float64 if any parameter is), on the device of the first parameter.

    Args:
        params: the parameters.
        model: the module that most of them belong to.
    """

    def __init__(self, params: Sequence[Tensor], model: nn.Module) -> None:
        self.params = list(params)
        names = {id(p): name for name, p in model.named_parameters()}
        self.names = [names.get(id(p)) for p in params]  # None for those that are not the model's

    def check_current(self, model: nn.Module) -> None:
        """Refuse parameters that have been frozen, or replaced in the model, and the caller's
        autocast, which would reach what is not a forward pass.

        Raises:
            RuntimeError: one of these; the message says what to do.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise RuntimeError(
                "an Objective was called within torch.autocast: call it outside, and pass "
                "Objective(autocast=...) for a model that is trained with it"
            )
        now = {id(p) for p in model.parameters()}
        for i, (p, name) in enumerate(zip(self.params, self.names, strict=True)):
            if not p.requires_grad or (name is not None and id(p) not in now):
                what = "been replaced" if p.requires_grad else "been frozen (requires_grad=False)"
                raise RuntimeError(
                    f"{name or f'params[{i}]'} has {what} since this Objective was made: make a "
                    "new one"
                )

    @property
    def size(self) -> int:
        """The number of scalar parameters, the length of a vector."""
        return sum(p.numel() for p in self.params)

    @property
    def device(self) -> torch.device:
        """The device of a vector."""
        return self.params[0].device

    @property
    def devices(self) -> set[torch.device]:
        """The devices of the parameters."""
        return {p.device for p in self.params}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a vector."""
        wide = any(p.dtype == torch.float64 for p in self.params)
        return torch.float64 if wide else torch.float32

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Concatenate one tensor for each parameter to a vector; None counts as zeros."""
        parts = [
            torch.zeros(p.numel(), dtype=self.dtype, device=self.device)
            if t is None
            else t.detach().to(self.device, self.dtype).reshape(-1)
            for t, p in zip(tensors, self.params, strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Split a vector into tensors of each parameter's shape, strides, dtype and device."""
        parts = torch.split(vector, [p.numel() for p in self.params])
        return [
            torch.empty_like(p).copy_(part.view(p.shape)).detach()
            for part, p in zip(parts, self.params, strict=True)
        ]

    def theta(self) -> Tensor:
        """The parameters as a vector."""
        return self.flatten(self.params)
