"""Every op in plain torch, on any device: the tests' reference, the kernels' documentation and the
back end where there is no compiler. Names, arguments and mutations are those of csrc/schema.cpp.
Half precision is computed in float32 and rounded once.

A *stack* has one dimension more than the tensor it belongs to, the first, and in it one slice for
each of K chunks: K calls in one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fbopt._ops.arguments import checked
from fbopt._ops.flat import flat_views, stacks_like

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the arithmetic: float64 for float64, float32 for the rest."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(numbers: Tensor, *lists: list[Tensor]) -> Iterator[tuple[Tensor, list[list[Tensor]]]]:
    """Yield each chunk's number and lists: those of slices, or the lists themselves for 0-dim."""
    if numbers.dim() == 0:
        yield numbers, list(lists)
        return
    slices = [[t.unbind() for t in tensors] for tensors in lists]
    if any(len(s) != len(numbers) for tensors in slices for s in tensors):
        raise ValueError(f"stacks must have {len(numbers)} slices, one for each chunk")
    for k, number in enumerate(numbers):
        yield number, [[s[k] for s in tensors] for tensors in slices]


@checked(writes=1)
def pack_(out: Tensor, tensors: list[Tensor]) -> None:
    """Set the 1-D `out` to the tensors one after the other, each in row-major order."""
    if tensors:
        out.copy_(torch.cat([t.reshape(-1) for t in tensors]))


@checked(writes=0)
def squared_norm(tensors: list[Tensor], stacked: bool = False) -> Tensor:
    """Return sum_i ||x_i||^2 as a 0-dim float64 tensor; of stacks (K,), one for each chunk."""
    squares = [t.double().square() for t in tensors]
    if stacked:
        return torch.stack([s.reshape(len(s), -1).sum(1) for s in squares]).sum(0)
    return torch.stack([s.sum() for s in squares]).sum()


@checked(writes=1)
def perturb_(
    out: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    radius: float,
    squared_norm: Tensor | None = None,
) -> Tensor:
    """Set out <- p + s g, s = radius / ||g|| (0 where g = 0); return ||g||^2 (0-dim, float64).

    `out` is one flat buffer: params one after the other, each in its own memory order and from a
    multiple of 16 elements on; the gaps are not written.
    `squared_norm` is given where `grads` are only a part of the gradient.

    With stacks of gradients the K copies p + s_k g_k of each parameter lie one after the other
    where the parameter would, and norms are (K,).
    """
    squared = squared_norm
    if squared is None:
        squared = _squared_norm(grads, _are_stacks(params, grads))
    squared = squared.double().clone()
    for view, p, g, s in _points(out, params, grads, radius, squared):
        view.copy_(p + s * g)
    return squared


_squared_norm = squared_norm


@checked(writes=0)
def adaptive_norms(params: list[Tensor], grads: list[Tensor], eta: float) -> Tensor:
    """Return ||g||^2 and ||T g||^2, T = abs(p) + eta for each element: (2,), float64.

    With stacks of gradients (2, K), one for each chunk.
    """
    stacked = _are_stacks(params, grads)
    pairs = zip(params, grads, strict=True)
    scaled = [(p.double().abs() + eta) * g.double() for p, g in pairs]
    return torch.stack([squared_norm(x, stacked) for x in (grads, scaled)])


@checked(writes=1)
def perturb_adaptive_(
    out: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    radius: float,
    eta: float,
    squared_norm: Tensor,
) -> None:
    """Set out <- p + s T^2 g, s = radius / ||T g|| (0 where that is 0), T = abs(p) + eta.

    `squared_norm` is ||T g||^2, see :func:`adaptive_norms`; the rest is as for :func:`perturb_`.
    """
    for view, p, g, s in _points(out, params, grads, radius, squared_norm.double()):
        t = p.abs() + eta
        view.copy_(p + (s * t) * (t * g))


def _are_stacks(params: list[Tensor], grads: list[Tensor]) -> bool:
    return any(g.dim() > p.dim() for p, g in zip(params, grads, strict=True))


def _points(
    out: Tensor, params: list[Tensor], grads: list[Tensor], radius: float, squared: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield each parameter's view into the flat buffer, itself, its gradient and the step, of each
    chunk: in the dtype of the arithmetic.
    """
    norm = squared.sqrt()
    step = torch.where(norm == 0, 0.0, radius / norm)
    stacked = _are_stacks(params, grads)
    views = flat_views(out, stacks_like(params, len(step)) if stacked else params)
    for s, (to, chunk) in _chunks(step, views, grads):
        for view, p, g in zip(to, params, chunk, strict=True):
            most = torch.finfo(_wide(p).dtype).max
            yield view, _wide(p), _wide(g), s.clamp(-most, most).to(_wide(p).dtype)


@checked(writes=1)
def accumulate_(sums: list[Tensor], grads: list[Tensor], weight: Tensor) -> None:
    """Add a <- a + w g, with a in float32 (float64 for float64 grads).

    With one weight for each of K chunks, (K,), grads are stacks: a <- a + w_1 g_1 + ... + w_K g_K,
    added from left to right.
    """
    for w, (chunk,) in _chunks(weight, grads):
        for a, g in zip(sums, chunk, strict=True):
            a.add_(w.to(a.dtype) * g.to(a.dtype))


@checked(writes=1)
def accumulate_penalty_(
    sums: list[Tensor],
    grads: list[Tensor],
    plus: list[Tensor],
    minus: list[Tensor],
    weight: Tensor,
    coefficient: Tensor,
    squared_norm: Tensor,
    radius: float,
) -> None:
    """Add a <- a + w (g + k (g+ - g-)): the chunk's gradient with lambda H g by finite differences.

    Forward differences (`minus` empty): g- = g, k = lambda ||g|| / radius; central: half that k.
    With (K,) weights and squared norms, grads, plus and minus are stacks, see :func:`accumulate_`.
    """
    values = _penalised(grads, plus, minus, coefficient, squared_norm, radius)
    accumulate_(sums, list(values), weight)


def _penalised(
    grads: list[Tensor],
    plus: list[Tensor],
    minus: list[Tensor],
    coefficient: Tensor,
    squared_norm: Tensor,
    radius: float,
) -> Iterator[Tensor]:
    """Yield g + k (g+ - g-), see :func:`accumulate_penalty_`."""
    norm = squared_norm.sqrt()
    factor = coefficient * norm / (2 * radius if minus else radius)
    factor = torch.where(norm == 0, 0.0, factor)
    for g, up, down in zip(grads, plus, minus or grads, strict=True):
        ones = [1] * (g.dim() - factor.dim())
        k = factor.to(_wide(g).dtype).reshape([*factor.shape, *ones])
        yield _wide(g) + k * (_wide(up) - _wide(down))


@checked(writes=3)
def accumulate_exact_(
    sums: list[Tensor],
    carries: list[Tensor],
    maxima: Tensor,
    grads: list[Tensor],
    weight: Tensor,
    scales: Tensor,
) -> None:
    """Add S <- S + rint(w g s) in integers, S = 2^64 carry + sum, s = `scales` of each tensor.

    `sums` (int64) wrap, and `carries` (int32) count how often; `maxima` <- max(maxima, w |g|).
    Scales are powers of two: for half precision and float32, with a weight of up to 29 significant
    bits, w g s is rounded once, to the integer, ties to even; for float64, w g is rounded as well.
    Values that are infinite, NaN or at least 2^94 are not added; maxima show them.
    With (K,) weights, grads are stacks, see :func:`accumulate_`.
    """
    for w, (chunk,) in _chunks(weight.double(), grads):
        for i, g in enumerate(chunk):
            _add_exact(sums[i], carries[i], maxima[i], _wide(g).double(), w, scales[i])


@checked(writes=3)
def accumulate_exact_penalty_(
    sums: list[Tensor],
    carries: list[Tensor],
    maxima: Tensor,
    grads: list[Tensor],
    plus: list[Tensor],
    minus: list[Tensor],
    weight: Tensor,
    scales: Tensor,
    coefficient: Tensor,
    squared_norm: Tensor,
    radius: float,
) -> None:
    """Add v = g + k (g+ - g-) of :func:`accumulate_penalty_` as :func:`accumulate_exact_` adds g.

    v is computed in float32, or in float64 for float64.
    """
    values = _penalised(grads, plus, minus, coefficient, squared_norm, radius)
    accumulate_exact_(sums, carries, maxima, list(values), weight, scales)


def _add_exact(
    sums: Tensor, carries: Tensor, maximum: Tensor, v: Tensor, weight: Tensor, scale: Tensor
) -> None:
    if v.numel():
        maximum.copy_(torch.maximum(maximum, v.abs().max() * weight))
    x = v * (weight * scale)
    x = torch.where(x.abs() < 2.0**94, x, 0.0)
    high = torch.where(x.abs() < 2.0**62, 0.0, (x * 2.0**-64).round())
    x = x - high * 2.0**64
    tie = x >= 2.0**63
    x, high = torch.where(tie, x - 2.0**64, x), torch.where(tie, high + 1, high)
    q = x.round().to(torch.int64)
    result = sums + q
    wraps = torch.where(((sums ^ result) & (q ^ result)) < 0, torch.where(q < 0, -1, 1), 0)
    sums.copy_(result)
    carries.add_((high.to(torch.int64) + wraps).to(torch.int32))


@checked(writes=1)
def exact_mean_(
    means: list[Tensor],
    sums: list[Tensor],
    carries: list[Tensor],
    maxima: Tensor,
    scales: Tensor,
    divisor: Tensor,
) -> None:
    """Set means (float32 or float64) <- (2^64 carry + sum) / s / divisor, computed in float64.

    All elements of a tensor are NaN if its maximum is not finite: some contribution was not.
    """
    for i, (m, a, c) in enumerate(zip(means, sums, carries, strict=True)):
        scale = torch.where(maxima[i].isfinite(), scales[i], float("nan"))
        m.copy_((c.double() * 2.0**64 + a.double()) / divisor.double() / scale)


def clip_coefficient(max_norm: float, total_norm: Tensor) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), a 0-dim float64 tensor."""
    return (max_norm / (total_norm.double() + CLIP_EPS)).clamp(max=1.0)


@checked(writes=1)
def clip_(grads: list[Tensor], total_norm: Tensor, max_norm: float) -> None:
    """Scale g <- min(1, max_norm / (total_norm + 1e-6)) g."""
    coefficient = clip_coefficient(max_norm, total_norm)
    for g in grads:
        g.copy_(_wide(g) * coefficient.to(_wide(g).dtype))


@checked(writes=3, steps=True)
def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    divisor: Tensor | None,
    total_norm: Tensor | None,
    max_norm: float | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """Take one step of clipped SGD, in torch.optim.SGD's own order.

    With `divisor`, grads are sums: they are replaced by their mean, which is used. `total_norm` is
    the norm of the mean; with `max_norm` the gradient is scaled as by :func:`clip_`. With `first`
    the momentum buffers are written but not read.
    """
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if divisor is not None:
            g.div_(divisor.to(_wide(g).dtype))
        wide = _wide(p)
        d = -g.to(wide.dtype) if maximize else g.to(wide.dtype)
        if max_norm is not None:
            d = d * clip_coefficient(max_norm, total_norm).to(wide.dtype)
        if weight_decay != 0:
            d = d + weight_decay * wide
        if momentum != 0:
            old = momentum_buffers[i]
            v = d if first else momentum * _wide(old) + (1 - dampening) * d
            old.copy_(v)
            d = d + momentum * v if nesterov else v
        p.copy_(wide - lr.to(wide.dtype) * d)


@checked(writes=1)
def row_products_(out: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> None:
    """Set out (2, R), float64, to the inner products of R rows (R, n) with two vectors (n,).

    In float64; rows and vectors are float32 or float64 and contiguous.
    """
    for i, row in enumerate(rows):
        for k, vector in enumerate((a, b)):
            out[k, i] = (row.double() * vector.double()).sum()


@checked(writes=1)
def combine_rows_(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """Set out (n,) <- c_1 x_1 + ... + c_R x_R for rows x_i and R coefficients, float64.

    Summed from left to right in float64, rounded once.
    """
    total = torch.zeros_like(out, dtype=torch.float64)
    for c, row in zip(coefficients, rows, strict=True):
        total += c * row.double()
    out.copy_(total)
