"""Whether two computations of a loss and its gradient differ by more than rounding.

How much rounding there is depends on the loss: near a minimum the gradient is what is left of terms
that cancel. Where doubt remains it is measured, by parameters that differ in their last bits.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]
TRIALS = 2  # changes of the last bits
SUMS = 64  # times the root of a sum's length: how many last bits its order may change


class Found(NamedTuple):
    """A loss, its gradient and perhaps H g by the parameters, None where one is not used; or those
    of K chunks.

    `dtypes` are those that the loss was computed in, empty where they are not known.
    """

    loss: Tensor
    grads: Tensors
    products: Tensors = ()
    dtypes: frozenset[torch.dtype] = frozenset()

    @property
    def vectors(self) -> list[Tensor | None]:
        """All but the loss."""
        return [*self.grads, *self.products]


class Precision(NamedTuple):
    """How exact a computation is.

    Attributes:
        share: what results may differ by, as a share.
        factor: how many times the effect of other last bits is rounding.
        last_bit: the relative distance of neighbouring numbers.
        order: what the order of sums may change, as a share of all vectors together.
    """

    share: float
    factor: float
    last_bit: float
    order: float

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], device: torch.device, terms: int = 1) -> Precision:
        """That of the least exact of some dtypes on a device, in sums of up to so many terms.

        A sum rounds by the root of their number, if not by less, and in another order otherwise:
        on one thread BatchNorm adds up a channel of a chunk one by one.
        """
        last_bit = max(torch.finfo(dtype).eps for dtype in dtypes)
        exact = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        order = min(max(100.0, SUMS * math.sqrt(terms)) * last_bit, 1e-2)
        if last_bit < 1e-12:
            return cls(1e-8, 100.0, last_bit, order)
        if last_bit < 1e-5 and exact:
            return cls(1e-3, 100.0, last_bit, order)
        coarse = max(last_bit, 2.0**-10)  # half precision, or float32 by TF32
        return cls(0.1, 4.0, coarse, min(4.0 * coarse, 1e-2))


class Comparison:
    """Compares a computation at some parameters with others.

    Args:
        run: computes, at the values that the parameters have when it is called.
        params: the parameters.
        names: theirs, for errors.
        terms: how many numbers the longest sums in the computation have.
    """

    def __init__(
        self,
        run: Callable[[], Found],
        params: Sequence[Tensor],
        names: Sequence[str],
        terms: int = 1,
    ) -> None:
        self._run, self._params, self._names = run, params, names
        self.expected = run()
        dtypes = self.expected.dtypes or {self.expected.loss.dtype}
        self._precision = Precision.of(dtypes, self.expected.loss.device, terms)

    def difference(self, found: Found) -> str | None:
        """How a computation differs by more than rounding; None if it does not."""
        if self._apart(found, 0.0, self._no_noise) is None:
            return None
        return self._apart(found, *self._noise)

    def _apart(self, found: Found, noise: float, noises: Sequence[float]) -> str | None:
        wanted, (share, factor, _, order) = self.expected, self._precision
        if _distance(found.loss, wanted.loss) > share * _norm([wanted.loss]) + factor * noise:
            return f"its loss is {_shown(found.loss)} rather than {_shown(wanted.loss)}"
        floor = order * _norm(wanted.vectors)
        triples = zip(found.vectors, wanted.vectors, noises, strict=True)
        for i, (v, w, n) in enumerate(triples):
            if v is None or w is None:
                continue
            if _distance(v, w) > share * _norm([w]) + floor + factor * n:
                name = self._names[i % len(self._names)]
                if i >= len(self._names):
                    return f"another product H g reaches {name}"
                return f"{'another' if v.any() else 'no'} gradient reaches {name}"
        return None

    @property
    def _no_noise(self) -> list[float]:
        return [0.0] * len(self.expected.vectors)

    @functools.cached_property
    def _noise(self) -> tuple[float, list[float]]:
        """By how much the loss, and each vector, change with the last bits of the parameters.

        A vector by at least the share by which all together do: which of them a ReLU that switches
        changes most is chance. Zero where they change without, in a run before or between: a state
        of its own is no rounding.
        """
        loss, vectors = 0.0, self._no_noise
        values = [p.detach() for p in self._params]
        for trial in range(TRIALS + 1):
            if self._apart(self._run(), 0.0, self._no_noise) is not None:
                return 0.0, self._no_noise
            if trial == TRIALS:
                break
            with pointing(self._params, [self._moved(v, trial) for v in values]):
                found = self._run()
            loss = max(loss, _distance(found.loss, self.expected.loss))
            pairs = zip(found.vectors, self.expected.vectors, strict=True)
            offs = [0.0 if v is None or w is None else _distance(v, w) for v, w in pairs]
            vectors = list(map(max, vectors, offs))
        norms = [_norm([w]) for w in self.expected.vectors]
        share = math.hypot(*vectors) / (math.hypot(*norms) or 1.0)
        return loss, [max(n, share * norm) for n, norm in zip(vectors, norms, strict=True)]

    def _moved(self, value: Tensor, trial: int) -> Tensor:
        """The value with other last bits, in a pattern that only its shape and the trial fix."""
        generator = torch.Generator().manual_seed(trial)
        signs = torch.randint(2, value.shape, generator=generator).to(value.device) * 2 - 1
        size = value.abs() + value.abs().float().mean().to(value.dtype)
        return value + (self._precision.last_bit * signs * size).to(value.dtype)


@contextlib.contextmanager
def pointing(params: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Point parameters to other memory within this context."""
    own = [p.detach() for p in params]
    try:
        _point(params, tensors)
        yield
    finally:
        _point(params, own)


def _point(params: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for p, t in zip(params, tensors, strict=True):
        p.data = t


def _distance(a: Tensor, b: Tensor) -> float:
    """||a - b||, 0 where both are not finite in the same places; inf where only one is."""
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    return float(torch.where(finite, a - b, 0.0).norm())


def _norm(vectors: Iterable[Tensor | None]) -> float:
    squares = [v.double().nan_to_num(0, 0, 0).square().sum() for v in vectors if v is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _shown(loss: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in loss.reshape(-1).tolist())
