"""The options of `fbopt analyze`, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from fbopt.train.config.options import OptionsError, flag

Measure = Literal["gradient", "sharpness", "trace", "flatness", "line", "plane"]
MEASURES = get_args(Measure)


@dataclass(frozen=True)
class Analysis:
    """Say what kind of minimum a run of `fbopt train` reached.

    RUNS are one to three run folders (of which the newest checkpoint is taken) or checkpoint files
    (RUN/checkpoint-STEP.pt). Several are measured alike and drawn beside each other. What is
    measured is the mean loss over the training set, without penalty and weight decay, in chunks of
    the run's size (for sgd: of its mini-batches), in the order of the data.
    """

    runs: tuple[Path, ...]
    """Run folders or checkpoint files, one to three."""
    measures: tuple[Measure, ...] = ("gradient", "sharpness", "trace", "flatness", "line")
    """What to measure. gradient: norms, noise scale, angle to the momentum. sharpness: the largest
    eigenvalues of the Hessian. flatness, line, plane: along random filter-normalised directions."""
    between: bool = False
    """Also draw the loss on the line between two runs, or in the plane of three, of one model."""
    out: Path | None = None
    """Folder for results.json and figures. Default: RUN/analysis; for several runs
    analysis-NAME-NAME beside the first."""
    seed: int = 0
    """Seed of all random vectors and directions, and of dropout draws."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, …"""
    batchnorm: Literal["chunk", "frozen"] = "chunk"
    """BatchNorm normalises by each chunk's own statistics, as in training, or by the checkpoint's
    running statistics."""
    dropout: Literal["off", "seeded"] = "off"
    """seeded keeps dropout, with masks that depend on seed, step and chunk."""
    products: Literal["exact", "central", "forward"] = "exact"
    """Hessian-vector products: by double backward, or by finite differences."""
    radius: float | None = None
    """Length of the shift in finite differences. Default: by the precision of the weights."""
    eigenvalues: int = 5
    """How many, at each end that is asked for."""
    ends: Literal["largest", "smallest", "both"] = "largest"
    """Which end of the spectrum; the smallest are the most negative."""
    tolerance: float = 1e-3
    """An eigenvalue's residual at convergence, as a share of it."""
    max_products: int = 200
    """Products with the Hessian after which the search for eigenvalues ends."""
    samples: int = 32
    """Random vectors for the trace."""
    threshold: float = 0.1
    """Rise of the loss that flatness is the distance to, in its units (nats)."""
    directions: int = 10
    """Random directions for flatness."""
    span: float = 0.5
    """Lines and planes reach from -span to span; 1 changes every filter by its own norm."""
    points: int = 61
    """Points of a line."""
    grid: int = 25
    """Points of a plane along each side."""
    vectors: Literal["zero", "scaled"] = "zero"
    """Whether directions leave out biases and BatchNorm's parameters, or scale them as a filter."""
    train_steps: int = 3
    """Training steps that are timed, to compare with; they change nothing."""


_LEAST = {
    "seed": 0, "eigenvalues": 1, "max_products": 1, "samples": 2, "directions": 2, "points": 3,
    "grid": 3, "train_steps": 1,
}  # fmt: skip
_ABOVE_ZERO = ("radius", "tolerance", "threshold", "span")


def check(options: Analysis) -> None:
    """Raise OptionsError for values that cannot work, before anything is read."""
    if not 1 <= len(options.runs) <= 3:
        raise OptionsError(f"give one to three runs, not {len(options.runs)}")
    if options.between and len(options.runs) == 1:
        raise OptionsError("--between needs two runs for a line, or three for a plane")
    if not options.measures and not options.between:
        raise OptionsError(f"--measures is empty; choose {', '.join(MEASURES)}")
    if unknown := [m for m in options.measures if m not in MEASURES]:
        raise OptionsError(f"--measures {unknown[0]}: choose {', '.join(MEASURES)}")
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            raise OptionsError(f"{flag(name)} {getattr(options, name)}: has to be at least {least}")
    for name in _ABOVE_ZERO:
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise OptionsError(f"{flag(name)} {value}: has to be above 0 and finite")


def as_json(options: Analysis) -> dict[str, object]:
    """The options as plain numbers, strings and lists."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return values | {
        "runs": [str(path) for path in options.runs],
        "out": None if options.out is None else str(options.out),
    }
