"""How a recipe and the device fill in the options that were left out."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from typing import Any

from fbopt.train.config.checks import check, check_device, check_effect
from fbopt.train.config.options import Options
from fbopt.train.config.recipes import RECIPES, Recipe, scale_of

# What is fast on a type of device and costs no accuracy: on the CPU the arithmetic of torch.
SPEED = {
    "cpu": {"precision": "fp32", "channels_last": True, "cuda_graph": False},
    "cuda": {"precision": "tf32", "channels_last": True, "cuda_graph": True},
}


def resolve(options: Options) -> Options:
    """Fill in everything that was left out from the recipe and the device; checks the result too.

    Without clipping `max_norm` becomes None; without a penalty `penalty`, `radius` and `method` do,
    without fixed augmentation `replicas`.
    """
    check(options)
    scale = options.scale or scale_of(options.data)
    recipe = RECIPES[scale][options.recipe]
    device = device_type(options.device)
    check_device(options, device)
    given = {k: v for k, v in asdict(options).items() if v is not None}
    values = {**asdict(recipe), **SPEED[device], **given}
    values |= _passes(options, recipe, values)
    values.setdefault("every", values["eval_every"] if options.tracked else 0)
    values |= {k: _unless_infinite(values.get(k)) for k in ("max_norm", "chunk_max_norm")}
    if values["augment"] == "fixed":
        values["replicas"] = values["replicas"] or 10
        values["with_clean"] = options.with_clean or recipe.with_clean
    if options.momentum == 0:
        values["nesterov"] = bool(options.nesterov)
    if (scale, values["model"]) == ("small", "cnn"):
        values.setdefault("threads", 1)
    if options.stochastic:
        values["cuda_graph"] = False
    elif options.switch_at:
        values["batch_size"] = values["batch_size"] or RECIPES[scale]["sgd"].batch_size
    check_effect(options, values)
    values |= _without(values)
    names = {field.name for field in fields(Options)} - {"scale"}
    return replace(options, scale=scale, **{k: v for k, v in values.items() if k in names})


def _passes(options: Options, recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """The schedule in proportion to the number of passes, and how often to report and keep."""
    passes = values["epochs"] if options.stochastic else values["steps"]
    share = passes / (recipe.epochs or recipe.steps)
    found = {
        "warmup": round(recipe.warmup * share),
        "cosine": max(1, round(recipe.cosine * share)),
        "eval_every": max(1, passes // 100),
        "log_every": max(1, passes // 400),
        "keep": 2,
        "fingerprint_every": 0,
    }
    return {k: v for k, v in found.items() if getattr(options, k) is None}


def _unless_infinite(bound: float | None) -> float | None:
    return None if bound == math.inf else bound


def _without(values: dict[str, Any]) -> dict[str, Any]:
    """The options that have no effect, as None (or False)."""
    found: dict[str, Any] = {}
    if not values["penalty"]:
        found |= {"penalty": None, "radius": None, "method": None}
    if values["augment"] != "fixed":
        found |= {"replicas": None, "with_clean": False}
    return found


def device_type(name: str) -> str:
    """Whether `--device` will be "cuda", or else "cpu"."""
    if name == "auto":
        import torch  # here, since help and typing errors should not wait for it

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name.partition(":")[0] == "cuda" else "cpu"
