"""The options of `fbopt flow`, their checks, and which runs a flow can be beside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fbopt.train.config.options import Options, OptionsError, flag

# The options of θ ← θ − lr ∇L(θ), or of RMSProp's step, with the same L and lr in every step.
NEEDED: dict[str, tuple[Any, ...]] = {
    "switch_at": (0,),
    "optimizer": ("sgd", "rmsprop", "adam", "adamw"),
    "beta1": (0.0, None),
    "line_search": (None, "none"),
    "momentum": (0.0, None),
    "weight_decay": (0.0,),
    "max_norm": (None, math.inf),
    "agc": (None,),
    "clip_history": (None,),
    "chunk_max_norm": (None,),
    "perturbation": (None, "none"),
    "penalty": (None, 0.0),
    "full_penalty": (None, 0.0),
    "norm_bias": (0.0,),
    "additive_noise": (0.0,),
    "multiplicative_noise": (0.0,),
    "augment": ("none", "fixed"),
    "augment_policy": ("none",),
    "chunks": ("fixed",),
    "dropout": (0.0,),
    "schedule": ("constant",),
    "warmup": (0,),
    "mean": (None, "samples"),
    "batchnorm": (None, "mean"),
    "last_chunk": (None, "keep"),
    "max_up": (1,),
    "first_rate": (None, "positive"),
}


@dataclass(frozen=True)
class FlowOptions:
    """Follow a flow in continuous time beside full-batch gradient descent or RMSProp.

    RUN is the folder of a run of `fbopt train` on the full batch with --momentum 0 --weight-decay 0
    --schedule constant --warmup 0, without clipping and penalty; by sgd, --optimizer rmsprop, or
    adam with --beta1 0. Its steps are taken again, and the flow beside them: gradient (continuous
    time), stable (no motion along directions of curvature above 2/lr), or central (the mean path at
    the edge of stability; needs clarabel). Written are flow-KIND.jsonl and flow-KIND.png.
    """

    run: tuple[Path, ...]
    """Run folder."""
    kind: Literal["gradient", "stable", "central"] = "central"
    """The flow."""
    after: int = 0
    """Steps that are taken before the flow begins: RMSProp's first ones are far above the edge."""
    steps: int | None = None
    """Steps beside the flow, units of its time. Default: those that the run has left."""
    every: int = 10
    """Steps between two records."""
    substeps: int = 2
    """Least number of sub-steps of the flow in a unit of its time."""
    margin: float = 0.05
    """Eigenvalues above (1 - margin) 2/lr belong to the edge of a central flow."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, …"""
    out: Path | None = None
    """Folder to write. Default: the run's."""

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return self.run[0] if self.out is None else self.out


def check(options: FlowOptions) -> None:
    """Raise OptionsError for an invalid option, before anything is read."""
    if len(options.run) != 1:
        raise OptionsError(f"give the folder of one run, not {len(options.run)}")
    for name in ("steps", "every", "substeps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionsError(f"{flag(name)} {value}: has to be at least 1")
    if options.after < 0:
        raise OptionsError(f"--after {options.after}: has to be at least 0")
    if not 0 <= options.margin < 1:
        raise OptionsError(f"--margin {options.margin}: has to be at least 0 and below 1")


def check_run(path: Path, made: Options) -> None:
    """Raise OptionsError where no flow can be beside a run with these options."""
    if made.stochastic:
        raise OptionsError(
            f"{path}: is of --recipe {made.recipe}, which has mini-batches; flows are beside "
            "full-batch gradient descent, such as --recipe fb-long"
        )
    for name, values in NEEDED.items():
        if (value := getattr(made, name)) not in values:
            raise OptionsError(
                f"{path}: was trained with {flag(name)} {value}, and flows are beside plain steps "
                f"of gradient descent or RMSProp; train it with {flag(name)} {_words(values)}"
            )


def _words(values: tuple[Any, ...]) -> str:
    known = [v for v in values if v is not None]
    return str(known[0]) if known else "left out"
