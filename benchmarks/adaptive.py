"""ASAM's chunk update, by fbopt and in plain torch.

T = abs(p) + eta; perturb by radius T^2 g / ||T g||, [second pass], restore, add w (g + k (g+ - g)).
"""

from __future__ import annotations

import torch

from benchmarks.contenders import ChunkUpdate, FboptUpdate, SecondPass


class FboptAdaptiveUpdate(FboptUpdate):
    """Both norms in one pass, 2 words, the point 3, the sum 4."""

    name, words = "fbopt, adaptive", 9


class LoopAdaptiveUpdate(ChunkUpdate):
    """One tensor at a time, as code that is released with ASAM works."""

    name, words = "per-tensor loop, adaptive", 34

    @torch.no_grad()
    def update(self, second_pass: SecondPass) -> None:
        c = self.chunk
        scaled = [(p.abs() + c.eta) * g for p, g in zip(self.params, c.grads, strict=True)]
        norm = torch.stack([v.norm() for v in scaled]).norm().item()
        for p, v in zip(self.params, scaled, strict=True):
            p.add_((p.abs() + c.eta) * v, alpha=c.radius / norm)
        second_pass()
        factor = c.coefficient * torch.stack([g.norm() for g in c.grads]).norm().item() / c.radius
        for p, old in zip(self.params, self.saved, strict=True):
            p.copy_(old)
        for a, g, up in zip(self.sums, c.grads, c.plus, strict=True):
            a.add_(c.weight * (g + factor * (up - g)))


class ForeachAdaptiveUpdate(ChunkUpdate):
    """The shortest foreach sequence: perturb in place, restore from a copy made once per step."""

    name, words = "foreach, in place, adaptive", 23

    @torch.no_grad()
    def update(self, second_pass: SecondPass) -> None:
        c = self.chunk
        scales = torch._foreach_abs(self.saved)
        torch._foreach_add_(scales, c.eta)
        scaled = torch._foreach_mul(scales, c.grads)
        norms = [torch.stack(torch._foreach_norm(v)).norm() for v in (c.grads, scaled)]
        plain, norm = torch.stack(norms).tolist()
        torch._foreach_mul_(scaled, scales)
        torch._foreach_add_(self.params, scaled, alpha=c.radius / norm)
        second_pass()
        torch._foreach_copy_(self.params, self.saved)
        factor = c.coefficient * plain / c.radius
        torch._foreach_add_(self.sums, c.grads, alpha=c.weight * (1 - factor))
        torch._foreach_add_(self.sums, c.plus, alpha=c.weight * factor)


ADAPTIVE_UPDATES = (FboptAdaptiveUpdate, LoopAdaptiveUpdate, ForeachAdaptiveUpdate)
