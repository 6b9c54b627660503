"""The options of the second point at which gradients are taken: which of them belong to
`--perturbation penalty|gnp|sam|asam|none`, and what they are where they are left out.
"""

from __future__ import annotations

from typing import Any

from fbopt.train.config.options import Options, OptionsError, flag
from fbopt.train.config.recipes import RHO

MOST = 1e30  # of the strength of one penalty by the other, in float32
STRENGTH = 0.5  # of a penalty that has to come from somewhere: the published one
PENALTIES, SHARPNESS = ("penalty", "gnp"), ("sam", "asam")
OF_PENALTIES = ("penalty", "full_penalty", "radius")
OF_SHARPNESS = ("rho", "scope", "sam_share")
ALL = ("perturbation", *OF_PENALTIES, "method", *OF_SHARPNESS)


def resolve_perturbation(given: Options, values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the perturbation, None for those that are not of the chosen one.

    Of the penalty and of none `perturbation` is None as well: the strength says which it is.
    """
    kind = _kind(given, values)
    _check(given, kind)
    found: dict[str, Any] = dict.fromkeys(ALL)
    if kind in PENALTIES:
        found |= {name: values[name] for name in (*OF_PENALTIES, "method")}
        found["full_penalty"] = values["full_penalty"] or None
        if values["penalty"] is None:
            found["penalty"] = 0.0 if found["full_penalty"] else STRENGTH
        if (found["full_penalty"] or 0.0) > MOST * found["penalty"] > 0:
            raise OptionsError(
                f"--full-penalty {found['full_penalty']:g}: has to be at most {MOST:g} times "
                f"--penalty {found['penalty']:g}"
            )
    elif kind in SHARPNESS:
        found["method"] = values["method"]
        found["rho"] = values["rho"] or RHO[kind]
        found["scope"] = values["scope"] or "chunk"
        found["sam_share"] = 1.0 if values["sam_share"] is None else values["sam_share"]
    return found | {"perturbation": None if kind in ("none", "penalty") else kind}


def _kind(given: Options, values: dict[str, Any]) -> str:
    if given.perturbation is not None:
        return given.perturbation
    strengths = values["penalty"], values["full_penalty"]
    return values["perturbation"] or ("penalty" if any(strengths) else "none")


def _check(given: Options, kind: str) -> None:
    """Refuse options of another perturbation, and those that exclude each other."""
    if kind in SHARPNESS:
        others, cure = OF_PENALTIES, "--perturbation penalty or gnp; add it"
    elif kind in PENALTIES:
        others, cure = OF_SHARPNESS, "--perturbation sam or asam; add it"
    else:
        others = (*OF_PENALTIES, "method", *OF_SHARPNESS)
        cure = "a perturbation; add --penalty 0.5 or --perturbation sam"
    for name in others:
        value = getattr(given, name)
        if value is not None and not (kind == "none" and value == 0):
            raise OptionsError(f"{flag(name)} has no effect without {cure}")
    if kind in PENALTIES and given.penalty == 0 and not given.full_penalty:
        raise OptionsError(
            f"--penalty 0 contradicts --perturbation {kind}; give a strength, or --perturbation "
            "none"
        )
    if kind == "gnp" and given.full_penalty:
        raise OptionsError("--full-penalty is on a squared norm: use --perturbation penalty")
    if kind in SHARPNESS and given.method == "exact":
        raise OptionsError(f"--method exact is for penalties, not for {kind}; use forward")
    if given.stochastic and given.scope == "full":
        raise OptionsError(
            "--scope full is only for full-batch recipes: of a step of sgd the mini-batch is all; "
            "leave it out"
        )
