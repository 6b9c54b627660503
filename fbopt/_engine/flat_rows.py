"""Vectors over all parameters as rows of matrices, one matrix for each device and dtype: their
inner products <x_i, v> and combinations sum_i c_i x_i.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fbopt._ops import dispatch
from fbopt._ops.flat import ALIGN, accumulator_dtype, by_device_and_dtype

# One matrix for each device and dtype; or one row of each.
Rows = list[Tensor]


class FlatRows:
    """The places of parameters in a row: one after the other, row-major, zeros at the end.

    Half precision is kept in float32.

    Args:
        params: plain tensors.
        device: where rows lie; None for the parameters' own devices.
    """

    def __init__(self, params: Sequence[Tensor], device: torch.device | None = None) -> None:
        self.params, self._device = list(params), device
        self._groups = by_device_and_dtype(self.params)

    def make(self, count: int) -> list[Tensor]:
        """Return matrices of so many rows of zeros."""
        return [self._zeros(group, count) for group in self._groups]

    def _zeros(self, group: Sequence[int], count: int) -> Tensor:
        first = self.params[group[0]]
        size = sum(self.params[i].numel() for i in group)
        columns = -(-max(size, 1) // ALIGN) * ALIGN  # some, for parameters without elements too
        dtype, device = accumulator_dtype(first.dtype), self._device or first.device
        made = torch.empty(count, columns, dtype=dtype, device=device)
        if made.is_cpu:
            ask_for_large_pages(made)
        return made.zero_()

    def views(self, row: Rows) -> list[Tensor]:
        """Return each parameter's part of a row, of its shape."""
        found = list(self.params)
        for group, flat in zip(self._groups, row, strict=True):
            sizes = [self.params[i].numel() for i in group]
            for i, part in zip(group, flat[: sum(sizes)].split(sizes), strict=True):
                found[i] = part.view(self.params[i].shape)
        return found


def ask_for_large_pages(tensor: Tensor) -> None:
    """Ask Linux, before the first write, to hold a tensor in pages of 2 MiB.

    A pass over all rows goes from one row to the next every few pages of 4 KiB, and would look up
    the place of each in memory. Where there are no such pages, nothing changes.
    """
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes - begin) // page * page
    if sys.platform == "linux" and size >= 2 << 20:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 14)  # MADV_HUGEPAGE


def rows(matrices: Sequence[Tensor], begin: int, end: int | None = None) -> Rows:
    """Return rows begin ... end - 1 of each matrix, or the one vector `begin`."""
    return [m[begin] if end is None else m[begin:end] for m in matrices]


def products(matrices: Rows, a: Rows, b: Rows) -> Tensor:
    """Return (2, R), float64, on the first device: the products of R rows with two vectors."""
    total: Tensor | None = None
    for matrix, x, y in zip(matrices, a, b, strict=True):
        out = torch.empty(2, len(matrix), dtype=torch.float64, device=matrix.device)
        dispatch.row_products_(out, matrix, x, y)
        total = out if total is None else total + out.to(total.device)
    assert total is not None
    return total


def combine_(out: Rows, matrices: Rows, coefficients: Tensor) -> None:
    """Set vectors `out` <- sum_i c_i x_i over the rows of matrices; (R,) coefficients, float64."""
    for to, matrix in zip(out, matrices, strict=True):
        dispatch.combine_rows_(to, matrix, coefficients.to(matrix.device))


def largest(vector: Rows) -> Tensor:
    """Return the largest magnitude of all elements, 0-dim, float64, on the first device."""
    norms = [torch.linalg.vector_norm(v, torch.inf).double() for v in vector]
    if len(norms) == 1:
        return norms[0]
    return torch.stack([n.to(norms[0].device) for n in norms]).max()
