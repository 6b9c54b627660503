"""Parameter space: lists of tensors, one for each parameter, as vectors, and vectors as lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ParameterSpace:
    """The space of a list of parameters.

    A vector is a 1-D tensor, the parameters one after the other in row-major order, float32
    (float64 if any parameter is), on the device of the first parameter.

    Args:
        params: the parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)

    @property
    def size(self) -> int:
        """The number of parameters, the length of a vector."""
        return sum(p.numel() for p in self.params)

    @property
    def dtype(self) -> torch.dtype:
        """The type of a vector."""
        wide = any(p.dtype == torch.float64 for p in self.params)
        return torch.float64 if wide else torch.float32

    @property
    def epsilon(self) -> float:
        """The unit roundoff of the model's arithmetic, that of its coarsest parameters."""
        return max(torch.finfo(p.dtype).eps for p in self.params)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The vector of one tensor for each parameter, None counting as zeros."""
        device, dtype = self.params[0].device, self.dtype
        parts = [
            torch.zeros(p.numel(), dtype=dtype, device=device)
            if t is None
            else t.detach().to(device, dtype).reshape(-1)
            for t, p in zip(tensors, self.params, strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """A vector as one tensor for each parameter, with its shape, strides, dtype and device."""
        parts = vector.split([p.numel() for p in self.params])
        return [
            torch.empty_like(p).copy_(part.view(p.shape)).detach()
            for part, p in zip(parts, self.params, strict=True)
        ]

    def theta(self) -> Tensor:
        """The parameters as a vector."""
        return self.flatten(self.params)

    @property
    def cuda_indices(self) -> list[int]:
        """The CUDA devices that parameters are on."""
        devices = {p.device for p in self.params if p.device.type == "cuda"}
        return sorted(torch.cuda.current_device() if d.index is None else d.index for d in devices)
