"""L-BFGS's history: pairs s = p' - p, y = g' - g, and the direction -H g that they give.

In compact form, with R = triu(S^T Y), D = diag(S^T Y) and gamma = <s, y> / <y, y> of the newest::

    H g = gamma g + S R^-T ((D + gamma Y^T Y) R^-1 S^T g - gamma Y^T g) - gamma Y R^-1 S^T g
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._engine.flat_rows import FlatRows, Rows, combine_, products, rows

# Pairs whose <s, y> is at most this share of ||s|| ||y|| say nothing of the curvature.
LEAST_CURVATURE = 1e-10
# Powell's: a damped pair has <s, y> = 0.2 <s, B s>.
DAMPED = 0.2


class History:
    """The last pairs, and the gradient that the next pair begins at.

    Words per parameter: 2 m + 1 in memory; a direction reads every pair twice, once for all inner
    products, with g and the newest y, and once to combine them: 4 m + 5. Inner products and the
    small systems are float64, on the device of the first matrix, and nothing is read on the host
    but by :meth:`add`.

    Args:
        params: plain tensors.
        size: m, the most pairs.
        device: where to keep them; None for the parameters' own devices.

    Source: Byrd, Nocedal and Schnabel, "Representations of quasi-Newton matrices and their use in
    limited memory methods", Mathematical Programming 63 (1994), theorem 2.2; damping: Powell,
    "Algorithms for nonlinear constraints that use Lagrangian functions" (1978).
    """

    def __init__(
        self, params: Sequence[Tensor], size: int, device: torch.device | None = None
    ) -> None:
        self.size = size
        self._layout = [[str(p.dtype), *p.shape] for p in params]
        # Row 0 is the gradient, rows 1 + 2 k and 2 + 2 k the pair of slot k.
        self.matrices = FlatRows(params, device).make(1 + 2 * size)
        options: Any = {"dtype": torch.float64, "device": self.matrices[0].device}
        # <s_i, y_k> and <y_i, y_k> by slots; only products of s with no older y are kept up.
        self._gram = torch.zeros(2, size, size, **options)
        self.clear()

    def clear(self) -> None:
        """Forget all pairs."""
        self.count, self._newest, self._gamma = 0, -1, 1.0
        self._is_measured = True  # whether the products with the newest y are known

    @property
    def gradient(self) -> Rows:
        """The gradient that the next pair begins at."""
        return rows(self.matrices, 0)

    def begin(self, gradient: Rows) -> None:
        """Take the gradient at the parameters as they are."""
        for own, g in zip(self.gradient, gradient, strict=True):
            own.copy_(g)

    def add(self, step: Rows, gradient: Rows, damping: float | None = None) -> bool:
        """Add the pair of a step and its change of the gradient, in place of the oldest.

        Args:
            step: s.
            gradient: g', which :attr:`gradient` is afterwards.
            damping: the length t where ``s = -t H g``, so that ``B s = -t g``, to damp: y becomes
                ``w y + (1 - w) B s`` where ``<s, y>`` is less than ``0.2 <s, B s>``. None does not.

        Returns:
            Whether the pair has positive curvature; without it, all pairs are forgotten.
        """
        if not self._is_measured:
            self._measure()
        slot = (self._newest + 1) % self.size
        pair = rows(self.matrices, 1 + 2 * slot, 3 + 2 * slot)
        s, y, old = rows(pair, 0), rows(pair, 1), self.gradient
        for to_s, to_y, ds, g, g0 in zip(s, y, step, gradient, old, strict=True):
            to_s.copy_(ds)
            to_y.copy_(g)
            to_y.sub_(g0)
        if damping is not None:
            _damp_(s, y, old, damping)
        ((ss, sy), (_, yy)) = products(pair, s, y).tolist()
        self.begin(gradient)
        if not sy > LEAST_CURVATURE * (ss * yy) ** 0.5:  # NaN, too
            self.clear()
            return False
        self.count, self._newest, self._gamma = min(self.count + 1, self.size), slot, sy / yy
        self._is_measured = False
        return True

    def direction_(self, out: Rows) -> None:
        """Set `out` <- -H g; -g without pairs."""
        if self.count == 0:
            for to, g in zip(out, self.gradient, strict=True):
                to.copy_(g)
                to.neg_()
            return
        coefficients = self._coefficients(self._measure())
        used = rows(self.matrices, 0, 1 + 2 * self.count)
        own = [torch.empty_like(g) for g in self.gradient] if self._is_apart(out) else out
        combine_(own, used, coefficients)
        if own is not out:
            for to, d in zip(out, own, strict=True):
                to.copy_(d)

    def _is_apart(self, out: Rows) -> bool:
        return any(o.device != m.device for o, m in zip(out, self.matrices, strict=True))

    def _measure(self) -> Tensor:
        """Return the products of g with g and all pairs; note those of the newest y."""
        k, newest = self.count, self._newest
        used = rows(self.matrices, 0, 1 + 2 * k)
        with_g, with_y = products(used, self.gradient, rows(used, 2 + 2 * newest))
        self._gram[:, :k, newest] = with_y[1:].view(k, 2).T
        self._gram[1, newest, :k] = with_y[2::2]
        self._is_measured = True
        return with_g

    def _coefficients(self, with_g: Tensor) -> Tensor:
        """The coefficients of g and all pairs in -H g."""
        k, newest, gamma = self.count, self._newest, self._gamma
        # From slots to the order of time, by shifts the host knows.
        back = -(newest + 1) % k if k == self.size else 0
        sy, yy = self._gram[:, :k, :k].roll((back, back), (1, 2))
        sg, yg = with_g[1:].view(k, 2).roll(back, 0).T[:, :, None]
        r = sy.triu()
        p = torch.linalg.solve_triangular(r, sg, upper=True)
        right = r.diagonal()[:, None] * p + gamma * (yy @ p - yg)
        q = torch.linalg.solve_triangular(r.T, right, upper=False)
        pairs = torch.cat([-q, gamma * p], 1).roll(-back, 0)
        return torch.cat([pairs.new_full((1,), -gamma), pairs.view(-1)])

    def state_dict(self) -> dict[str, Any]:
        """Return copies of what :meth:`load_state_dict` needs."""
        used = rows(self.matrices, 0, 1 + 2 * self.count)
        return {
            "parameters": [list(one) for one in self._layout],
            "rows": [matrix.clone() for matrix in used],
            "products": self._gram.clone(),
            "newest": self._newest,
            "gamma": self._gamma,
        }

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a saved state is of parameters of these shapes and dtypes, and of this size."""
        widths = [[m.shape[1] for m in part] for part in (state["rows"], self.matrices)]
        return (
            state.get("parameters") == self._layout
            and state["products"].shape == self._gram.shape
            and widths[0] == widths[1]
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, with the same bits.

        Raises:
            ValueError: it is of other parameters or another size.
        """
        saved = state["rows"]
        if not self.fits(state):
            raise ValueError(
                "the state dict has the history of other parameters or of another history_size: "
                "make the optimizer as it was when the state was saved"
            )
        for own, rows_ in zip(self.matrices, saved, strict=True):
            own[: len(rows_)].copy_(rows_)
        self._gram.copy_(state["products"])
        self.count = (len(saved[0]) - 1) // 2
        self._newest, self._gamma = state["newest"], state["gamma"]
        self._is_measured = self.count == 0


def _damp_(s: Rows, y: Rows, gradient: Rows, length: float) -> None:
    """Set y <- w y + (1 - w) B s with B s = -t g; see :meth:`History.add`."""
    pair = [torch.stack([a, b]) for a, b in zip(y, gradient, strict=True)]
    sy, sg = products(pair, s, s)[0].tolist()
    least = -length * sg
    if not sy < DAMPED * least:
        return
    w = (1 - DAMPED) * least / (least - sy)
    for to, g in zip(y, gradient, strict=True):
        to.mul_(w).add_(g, alpha=-(1 - w) * length)
