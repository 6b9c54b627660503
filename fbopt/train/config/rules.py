"""The update rules of `--optimizer`: which options each has, and what they are where none is given.

The recipe's rate is for sgd. The others begin at torch's defaults where torch has the rule, else at
rates found by hand on MNIST-1D. The recipe's weight decay is L2, a term of the loss, and holds for
all; adamw and muon, which shrink the weights beside the gradient's step, have torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fbopt.train.config.options import Options, OptionsError, flag

OWN = ("momentum", "nesterov", "beta1", "beta2", "eps", "alpha", "trust")  # of some rules only
_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
RULES: dict[str, dict[str, Any]] = {  # None: from the recipe
    "sgd": {"momentum": None, "nesterov": None},
    "adam": {"lr": 1e-3, **_ADAM},
    "adamw": {"lr": 1e-3, **_ADAM, "weight_decay": 1e-2},
    "rmsprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0},
    "sign": {"lr": 1e-3},
    "normalized": {"lr": 0.1},
    "muon": {"lr": 1e-3, "momentum": 0.95, "nesterov": True, **_ADAM, "weight_decay": 0.1},
    "lars": {"lr": 10.0, "trust": 1e-3, "momentum": None},
    "lbfgs": {"lr": 1.0, "weight_decay": 0.0},
}
# What some rules see of a gradient, and the options that do not change it.
BLIND = {
    "sign": ("signs", ("max_norm", "clip_history", "agc")),
    "normalized": ("direction", ("max_norm", "clip_history")),
    "lars": ("direction in each tensor", ("max_norm", "clip_history")),
}
PRECONDITIONED = ("adam", "adamw", "rmsprop")  # whose steps see a preconditioned Hessian


def own_values(optimizer: str) -> dict[str, Any]:
    """The defaults of a rule that replace the recipe's; its options without a meaning are None."""
    rule = RULES[optimizer]
    without = {name: None for name in OWN if name not in rule}
    return without | {name: value for name, value in rule.items() if value is not None}


def check_rule(given: Options) -> None:
    """Refuse options that the chosen rule does not have. Raises OptionsError."""
    rule = RULES[given.optimizer]
    if given.eps == 0:
        raise OptionsError(
            "--eps 0: has to be above 0, or a gradient of zero would be divided by zero"
        )
    if given.optimizer == "muon" and given.precision == "fp64":
        raise OptionsError(
            "--precision fp64: --optimizer muon orthogonalises in bfloat16, as torch does; choose "
            "another rule, or fp32"
        )
    for name in OWN:
        if getattr(given, name) is not None and name not in rule:
            users = ", ".join(rule for rule, options in RULES.items() if name in options)
            raise OptionsError(
                f"{flag(name)} is for --optimizer {users}, not for {given.optimizer}; leave it out"
            )


def check_clipping(given: Options, values: Mapping[str, Any]) -> None:
    """Refuse clipping that has no effect, given the values of the recipe. Raises OptionsError."""
    is_blind = given.optimizer in BLIND and not (values["weight_decay"] or values["additive_noise"])
    clips = values["max_norm"] not in (None, math.inf) or given.clip_history
    if given.norm_type != Options.norm_type and (is_blind or not clips):
        raise OptionsError(
            "--norm-type has no effect without clipping; add --max-norm 0.25 or --clip-history 10"
        )
    if not is_blind:
        return
    sees, names = BLIND[given.optimizer]
    for name in names:
        if getattr(given, name) not in (None, math.inf):
            raise OptionsError(
                f"{flag(name)} has no effect on --optimizer {given.optimizer}, which follows the "
                f"gradient's {sees} alone, without --weight-decay; leave it out"
            )


def has_threshold(options: Options) -> bool:
    """Whether it is known above which curvature the steps of a run diverge."""
    known = options.optimizer in ("sgd", *PRECONDITIONED)
    return known and not options.agc and options.line_search is None


def is_preconditioned(options: Options) -> bool:
    """Whether that is known of the preconditioned Hessian."""
    return options.optimizer in PRECONDITIONED and not options.agc
