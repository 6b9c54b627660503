"""The options of `fbopt analyze` and their checks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fbopt.train.config.options import OptionsError, flag

Measure = Literal[
    "gradient", "sharpness", "trace", "flatness", "line", "plane",
    "spectrum", "fisher", "rank", "direction", "batches",
]  # fmt: skip
MEASURES = get_args(Measure)


@dataclass(frozen=True)
class Analysis:
    """Measure what kind of minimum a run of `fbopt train` reached.

    RUNS are one to three run folders (their newest checkpoint is used) or checkpoint files
    (RUN/checkpoint-STEP.pt); several are drawn side by side. The measures are of the mean loss over
    the training set, without weight decay, and without penalty unless --penalised is given, in
    chunks of the run's size (sgd: of its mini-batch size), in the order of the data and in the
    precision that the run trained in.
    """

    runs: tuple[Path, ...]
    """Run folders or checkpoint files, one to three."""
    measures: tuple[Measure, ...] = ("gradient", "sharpness", "trace", "flatness", "line")
    """What to measure. gradient: norms, noise scale, angle to the momentum. sharpness: the largest
    eigenvalues of the Hessian. flatness, line, plane: along random filter-normalised directions.
    spectrum: the density of all eigenvalues. fisher: traces of Fisher matrices. rank: effective
    rank of the chunks' gradients. direction: curvature along the gradient, critical sharpness,
    shares in the top eigenspace. batches: sharpness, losses and gradients of mini-batches."""
    between: bool = False
    """Also measure the loss on the line through two runs of one model, or in the plane of three."""
    penalised: bool = False
    """Measure the objective of a run with --penalty in place of its loss: that with the penalty of
    the checkpoint's next step. Not for fisher and batches, which are of single samples."""
    out: Path | None = None
    """Folder for results.json and the figures. Default: RUN/analysis; for several runs
    analysis-NAME-NAME beside the first."""
    seed: int = 0
    """Seed of all random vectors and directions, and of dropout draws."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, …"""
    batchnorm: Literal["chunk", "frozen"] = "chunk"
    """Whether BatchNorm normalises by each chunk's own statistics, as in training, or by the
    checkpoint's running statistics (frozen)."""
    dropout: Literal["off", "seeded"] = "off"
    """Whether dropout is off, or on with masks that depend on the seed and the chunk (seeded)."""
    products: Literal["exact", "central", "forward"] = "exact"
    """Hessian-vector products: by double backward, or by finite differences, which are inaccurate
    for runs in bf16."""
    radius: float | None = None
    """Length of the shift in finite differences. Default: from the precision of the passes."""
    eigenvalues: int = 5
    """Number of eigenvalues at each end."""
    ends: Literal["largest", "smallest", "both"] = "largest"
    """Which end of the spectrum; the smallest are the most negative."""
    tolerance: float = 1e-3
    """An eigenvalue has converged when its residual is below this fraction of it."""
    max_products: int = 200
    """Largest number of Hessian-vector products for the eigenvalues."""
    samples: int = 32
    """Number of random vectors for traces, and of mini-batches of each size."""
    probes: int = 5
    """Number of random vectors for the spectrum."""
    steps: int = 80
    """Largest number of Hessian-vector products for each of them."""
    batch_sizes: tuple[int, ...] = (8, 32, 128)
    """Mini-batch sizes; those above the size of the training set are left out."""
    threshold: float = 0.1
    """Flatness is the distance at which the loss has risen by so much (nats)."""
    directions: int = 10
    """Number of random directions for flatness."""
    span: float = 0.5
    """Lines and planes reach from -span to span; 1 changes every filter by its own norm."""
    points: int = 61
    """Number of points of a line."""
    grid: int = 25
    """Number of points along each side of a plane."""
    vectors: Literal["zero", "scaled"] = "zero"
    """Whether directions leave out biases and BatchNorm's parameters or scale each as a filter."""
    train_steps: int = 3
    """Passes of training to time for comparison; the run is not changed."""


_LEAST = {
    "seed": 0, "eigenvalues": 1, "max_products": 1, "samples": 2, "directions": 2, "points": 3,
    "grid": 3, "train_steps": 1, "probes": 2, "steps": 2,
}  # fmt: skip
# Of what is allocated at once; those of the square of a grid, too.
_MOST = {
    "seed": 2**63 - 1, "eigenvalues": 10**5, "max_products": 10**9, "samples": 10**6,
    "directions": 10**6, "points": 10**6, "grid": 10**3, "train_steps": 10**6,
    "probes": 10**6, "steps": 10**6,
}  # fmt: skip
_ABOVE_ZERO = ("radius", "tolerance", "threshold", "span")


def check(options: Analysis) -> None:
    """Raise OptionsError for an invalid option, before anything is read."""
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
    for name, most in _MOST.items():
        if getattr(options, name) > most:
            raise OptionsError(f"{flag(name)} {getattr(options, name)}: has to be at most {most:,}")
    for name in ("fisher", "batches"):
        if options.penalised and name in options.measures:
            raise OptionsError(f"--penalised: {name} is of the loss alone; leave one of them out")
    if not options.batch_sizes:
        raise OptionsError("--batch-sizes is empty; give numbers of samples")
    if min(options.batch_sizes) < 1:
        raise OptionsError(f"--batch-sizes {min(options.batch_sizes)}: has to be at least 1")
    for name in _ABOVE_ZERO:
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise OptionsError(f"{flag(name)} {value}: has to be above 0 and finite")


def as_json(options: Analysis) -> dict[str, Any]:
    """The options as plain numbers, strings and lists."""
    return json.loads(json.dumps(asdict(options), default=str))
