"""The optimizer of `--optimizer` from resolved options, and the layer that is left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fbopt import LBFGS
from fbopt.train.config.options import Options
from fbopt.train.optimizers.lars import LARS
from fbopt.train.optimizers.muon import Muon
from fbopt.train.optimizers.simple import NormalizedGD, SignDescent

Groups = list[dict[str, Any]]


def build(options: Options, model: nn.Module, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer of any rule but sgd; `groups` say which parameters decay.

    Adam and AdamW use torch's fused kernels, on the CPU too; torch has none for RMSprop and Muon.
    """
    o, lr = options, options.lr
    if o.optimizer == "lbfgs":
        search = None if o.line_search == "none" else o.line_search
        params = [p for group in groups for p in group["params"]]
        return LBFGS(params, lr, o.history, search, max_norm=o.max_norm, max_iter=o.iterations)
    if o.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if o.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
    if o.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, alpha=o.alpha, eps=o.eps, momentum=o.momentum)
    if o.optimizer == "muon":
        rule = {"momentum": o.momentum, "nesterov": o.nesterov}
        adamw = {"betas": (o.beta1, o.beta2), "eps": o.eps}
        return Muon(split_matrices(model, groups), lr=lr, **rule, **adamw)
    if o.optimizer == "lars":
        return LARS(groups, lr=lr, momentum=o.momentum, trust=o.trust)
    return {"sign": SignDescent, "normalized": NormalizedGD}[o.optimizer](groups, lr=lr)


def split_matrices(model: nn.Module, groups: Groups) -> Groups:
    """Each group in two, the first for Muon: weights of convolutions and all but the last linear
    layer.
    """
    layers = [m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear)]
    last = last_linear(model)
    weights: set[Tensor] = {layer.weight for layer in layers if layer is not last}
    parts = (
        {**group, "params": [p for p in group["params"] if (p in weights) is matrices],
         "matrices": matrices}
        for group in groups
        for matrices in (True, False)
    )  # fmt: skip
    return [part for part in parts if part["params"]]


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The last linear layer of a network, which tells the classes apart; None if there is none."""
    return next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
