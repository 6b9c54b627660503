"""The options of `fbopt train`, their checks, and how a recipe fills in what was left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fbopt.train.recipes import RECIPES, Recipe, scale_of
from fbopt.train.sources import DataError, parse

RecipeName = Literal["sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong"]
ModelName = Literal[
    "cnn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet20", "resnet32", "resnet56", "resnet110", "vgg11", "vgg13", "vgg16", "vgg19",
    "densenet121", "densenet169",
]  # fmt: skip
Method = Literal["forward", "central", "exact"]
Accumulation = Literal["float32", "exact"]
Augment = Literal["none", "random", "fixed"]
Sampling = Literal["fixed", "shuffled", "replacement"]
TRACKED = ("sharpness", "noise")


class OptionsError(ValueError):
    """An option that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Options:
    """Train a network by full-batch gradient descent, or by SGD to compare.

    What is left out (None) is taken from the recipe for this data; the run folder records what
    was used. A pass is one visit to every training sample: one full-batch step, or one epoch of
    SGD.
    """

    data: str = "mnist1d"
    """Data set: mnist1d, digits, cifar10, cifar100, npz:PATH (x_train, y_train, x_test, y_test) or
    imagefolder:PATH (train/CLASS/IMAGE and test/CLASS/IMAGE)."""
    data_dir: Path | None = None
    """Folder with the files of cifar10 or cifar100. Default: data."""
    download: bool = False
    """Download cifar10 or cifar100 where they are not in that folder."""
    recipe: RecipeName = "fb-penalty"
    """Row of the paper's ladder to follow."""
    scale: Literal["small", "images"] | None = None
    """Which version of the recipe: the paper's for images, or one scaled down for small data sets.
    Default: images for imagefolder, cifar10 and cifar100, else small."""
    model: ModelName | None = None
    """Network: a small CNN without BatchNorm; or, for images, the paper's ResNets (18 to 152),
    He et al.'s for CIFAR (20 to 110), VGGs with BatchNorm, DenseNets."""
    width: int | None = None
    """Channels of the network's first layer, which the others follow. Default: 25 for cnn, 16 for
    resnet20 to resnet110, else 64."""
    image_size: int = 32
    """Side in pixels that imagefolder's images are resized to."""
    augment: Augment | None = None
    """Random crops (after padding by 4 black pixels) and horizontal flips of the training images:
    none; random, new ones in every pass; or fixed, the same few of every image in every pass, an
    enlarged data set that is never stored. sgd visits one of these replicas per epoch."""
    replicas: int | None = None
    """Draws of every image for --augment fixed. Default: 10."""
    with_clean: bool = False
    """For --augment fixed: the first of the replicas is the images as they are."""
    chunks: Sampling | None = None
    """How samples are put into chunks or mini-batches: fixed, in the data's order; shuffled, in a
    new order every pass; replacement, drawn with replacement. Default: shuffled for sgd, else
    fixed."""
    seed: int = 0
    """Seed of the initial weights and of all that is drawn: the order of the samples, crops, flips
    and dropout masks."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is cuda where there is one."""
    threads: int | None = None
    """Threads that torch computes with. Default: 1 for the small CNN on small data, where more
    would only wait for each other, else torch's own choice."""
    out: Path | None = None
    """Folder to write. Default: runs/DATA-RECIPE-sSEED."""
    overwrite: bool = False
    """Replace a run that is already in the folder."""
    resume: Literal["auto"] | Path | None = None
    """Go on with the interrupted run in this folder, with its own options; auto: with the run that
    the other options make, from the beginning where there is none yet."""
    lr: float | None = None
    """Peak learning rate."""
    steps: int | None = None
    """Full-batch steps (not for sgd). Warm-up and cosine shrink or grow with it unless given."""
    epochs: int | None = None
    """Epochs (only for sgd). Warm-up and cosine shrink or grow with it unless given."""
    warmup: int | None = None
    """Passes over which the learning rate rises linearly."""
    cosine: int | None = None
    """Passes after the warm-up in which a cosine would take the learning rate to zero."""
    chunk_size: int | None = None
    """Samples per forward and backward pass of a full-batch step (not for sgd). It defines the
    penalty and BatchNorm's batch: part of the method, not only of the memory needed."""
    batch_size: int | None = None
    """Samples per mini-batch (only for sgd)."""
    max_norm: float | None = None
    """Clip the gradient to this norm; inf for no clipping."""
    penalty: float | None = None
    """Strength of the gradient penalty, λ = lr·strength/4 (not for sgd); 0 for none."""
    radius: float | None = None
    """Length of the shift of the finite difference in the penalty."""
    method: Method | None = None
    """How the penalty's gradient is computed."""
    momentum: float | None = None
    """Momentum; 0 for none."""
    nesterov: bool | None = None
    """Nesterov's variant of momentum."""
    weight_decay: float | None = None
    """L2 regularisation, as in torch.optim.SGD."""
    accumulation: Accumulation = "float32"
    """How gradients are summed over chunks (not for sgd): in float32, or exact: in integers, with
    the same bits in any order of the chunks and on any number of processes."""
    decay: Literal["all", "weights"] | None = None
    """What decays: all parameters, or only the weights of convolutions and linear layers."""
    label_smoothing: float | None = None
    """Share of the target that is spread evenly over the classes, in training only."""
    dropout: float = 0.0
    """Probability with which an input of the last layer is dropped."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation: flip averages the probabilities of every test image and its mirror
    image."""
    eval_every: int | None = None
    """Passes between two evaluations on the test set. Default: a hundredth of the run."""
    log_every: int | None = None
    """Passes between two lines of metrics.jsonl. Default: a four-hundredth of the run."""
    save_every: int | None = None
    """Optimizer steps between two checkpoints. Default: one every five minutes."""
    keep: int | None = None
    """Checkpoints to keep, the newest. Default: 2."""
    fingerprint_every: int | None = None
    """Steps between two lines of fingerprints.jsonl. Default: 0, only with checkpoints."""

    track: str = ""
    """Measures to add to the metrics and curves, as in sharpness,noise: the largest eigenvalue of
    the full-batch Hessian beside the threshold of stability, the gradient noise scale."""
    every: int | None = None
    """Passes between two of the measures that --track names. Default: as --eval-every."""

    @property
    def tracked(self) -> tuple[str, ...]:
        """The measures that `track` names."""
        return tuple(name.strip() for name in self.track.split(",") if name.strip())

    @property
    def stochastic(self) -> bool:
        """Whether this is mini-batch SGD."""
        return self.recipe == "sgd"

    @property
    def passes(self) -> int:
        """Visits to every training sample, in resolved options: epochs, or full-batch steps."""
        return self.epochs if self.stochastic else self.steps

    @property
    def folder(self) -> Path:
        """The run folder: `out`, or runs/DATA-RECIPE-sSEED."""
        return self.out or Path("runs") / f"{self.data_name}-{self.recipe}-s{self.seed}"

    @property
    def data_name(self) -> str:
        """A short name of the data set: its own, or the end of the path."""
        kind, path = parse(self.data)
        return kind if path is None else path.stem or kind

    def as_json(self) -> dict[str, Any]:
        """The options as plain numbers and strings."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Options:
        """The options that `as_json` gave, in this or an earlier version."""
        names = ("out", "resume", "data_dir")
        paths = {k: Path(values[k]) for k in names if values.get(k) not in (None, "auto")}
        known = {field.name for field in fields(cls)}
        earlier = {k: v for k, v in implied(values).items() if k in known}
        return cls(**{**earlier, **values, **paths})


_SGD_ONLY = ("epochs", "batch_size")
_FULL_BATCH_ONLY = ("steps", "chunk_size", "penalty", "radius", "method")
_COUNTS = """width image_size replicas threads steps epochs cosine chunk_size batch_size eval_every
log_every save_every keep"""
# lower bound, whether the bound itself is allowed, upper bound (never reached)
_BOUNDS = {
    **dict.fromkeys(_COUNTS.split(), (1, True, math.inf)),
    **dict.fromkeys(
        ("seed", "warmup", "penalty", "weight_decay", "fingerprint_every", "every"),
        (0, True, math.inf),
    ),
    **dict.fromkeys(("lr", "radius"), (0, False, math.inf)),
    **dict.fromkeys(("momentum", "dropout", "label_smoothing"), (0, True, 1)),
}
_CHOICES = {
    "recipe": get_args(RecipeName),
    "scale": tuple(RECIPES),
    "model": get_args(ModelName),
    "method": get_args(Method),
    "accumulation": get_args(Accumulation),
    "augment": get_args(Augment),
    "chunks": get_args(Sampling),
    "decay": ("all", "weights"),
    "tta": ("none", "flip"),
}


def implied(values: Mapping[str, Any]) -> dict[str, Any]:
    """What options that a run's version of fbopt did not have yet meant: what its recipe says."""
    recipe = RECIPES.get(values.get("scale"), {}).get(values.get("recipe"))
    return {} if recipe is None else asdict(recipe)


def flag(name: str) -> str:
    """The option of the command line that sets the field `name`."""
    return "--" + name.replace("_", "-")


def check(options: Options) -> None:
    """Raise OptionsError for values that cannot work, before anything is read or written."""
    for name, allowed in _CHOICES.items():
        if (value := getattr(options, name)) is not None and value not in allowed:
            raise OptionsError(f"{flag(name)} {value}: choose {', '.join(allowed)}")
    for name, bounds in _BOUNDS.items():
        if (value := getattr(options, name)) is not None:
            _check_bounds(name, value, *bounds)
    if options.max_norm is not None and not options.max_norm > 0:
        raise OptionsError(f"--max-norm {options.max_norm}: has to be above 0; inf for no clipping")
    if options.seed >= 2**63:
        raise OptionsError(f"--seed {options.seed}: has to be below 2**63")
    if options.resume == "auto" and options.overwrite:
        raise OptionsError("--overwrite contradicts --resume auto; leave one of them out")
    if unknown := [name for name in options.tracked if name not in TRACKED]:
        raise OptionsError(
            f"--track {unknown[0]}: choose {', '.join(TRACKED)}, with commas between"
        )
    if options.every and not options.tracked:
        raise OptionsError("--every goes with --track; add --track sharpness,noise")
    if options.every == 0 and options.tracked:
        raise OptionsError("--every 0: has to be at least 1")
    _check_belongs(options)
    try:
        kind, _ = parse(options.data)
    except DataError as error:
        raise OptionsError(str(error)) from error
    for name in ("data_dir", "download"):
        if getattr(options, name) and not kind.startswith("cifar"):
            raise OptionsError(
                f"{flag(name)} is only for --data cifar10 and cifar100; leave it out"
            )


def _check_bounds(name: str, value: float, low: float, closed: bool, high: float) -> None:
    if not (low <= value if closed else low < value) or not value < high:
        words = f"{'at least' if closed else 'above'} {low}"
        words += " and finite" if math.isinf(high) else f" and below {high}"
        raise OptionsError(f"{flag(name)} {value}: has to be {words}")


def _check_belongs(options: Options) -> None:
    """Refuse options that the chosen recipe would silently ignore."""
    if options.stochastic and options.accumulation != "float32":
        raise OptionsError(
            "--accumulation exact is for sums over chunks, and --recipe sgd has none; leave it "
            "out, or choose a full-batch recipe such as --recipe fb-penalty"
        )
    only, other = (_FULL_BATCH_ONLY, "a full-batch recipe such as --recipe fb-penalty")
    if not options.stochastic:
        only, other = (_SGD_ONLY, "--recipe sgd")
    for name in only:
        if getattr(options, name) is not None:
            use = {
                "epochs": "; use --steps",
                "batch_size": "; use --chunk-size",
                "steps": "; use --epochs",
                "chunk_size": "; use --batch-size",
            }
            raise OptionsError(
                f"{flag(name)} is only for {other}, not for --recipe "
                f"{options.recipe}{use.get(name, '; leave it out')}"
            )


def resolve(options: Options) -> Options:
    """Fill in everything that was left out from the recipe; checks the result too.

    Without clipping `max_norm` becomes None; without a penalty `penalty`, `radius` and `method` do,
    without fixed augmentation `replicas`.
    """
    check(options)
    scale = options.scale or scale_of(options.data)
    recipe = RECIPES[scale][options.recipe]
    given = {k: v for k, v in asdict(options).items() if v is not None}
    values = {**asdict(recipe), **given}
    passes = values["epochs"] if options.stochastic else values["steps"]
    values |= {k: v for k, v in _schedule(recipe, passes).items() if k not in given}
    values.setdefault("eval_every", max(1, passes // 100))
    values.setdefault("log_every", max(1, passes // 400))
    values = {"keep": 2, "fingerprint_every": 0, **values}
    values.setdefault("every", values["eval_every"] if options.tracked else 0)
    if values["max_norm"] == math.inf:
        values["max_norm"] = None
    if not values["penalty"]:
        _check_no_penalty(options)
        values |= {"penalty": None, "radius": None, "method": None}
    if values["augment"] == "fixed":
        values["replicas"] = values["replicas"] or 10
        values["with_clean"] = options.with_clean or recipe.with_clean
    else:
        _check_not_fixed(options)
        values |= {"replicas": None, "with_clean": False}
    if options.momentum == 0:
        values["nesterov"] = bool(options.nesterov)
    if (scale, values["model"]) == ("small", "cnn"):
        values.setdefault("threads", 1)
    names = {field.name for field in fields(Options)} - {"scale"}
    resolved = replace(options, scale=scale, **{k: v for k, v in values.items() if k in names})
    if resolved.nesterov and resolved.momentum == 0:
        raise OptionsError("--nesterov needs momentum; give --momentum 0.9 or --nesterov False")
    return resolved


def _schedule(recipe: Recipe, passes: int) -> dict[str, int]:
    """The recipe's warm-up and cosine, in proportion to the number of passes."""
    share = passes / (recipe.epochs or recipe.steps)
    return {"warmup": round(recipe.warmup * share), "cosine": max(1, round(recipe.cosine * share))}


def _check_no_penalty(options: Options) -> None:
    for name in ("radius", "method"):
        if getattr(options, name) is not None:
            raise OptionsError(
                f"{flag(name)} has no effect without a penalty; add --penalty 0.5 "
                "or use --recipe fb-penalty"
            )


def _check_not_fixed(options: Options) -> None:
    for name in ("replicas", "with_clean"):
        if getattr(options, name):
            raise OptionsError(f"{flag(name)} has no effect without --augment fixed; add it")
