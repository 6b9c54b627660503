"""The options of `fbopt train`, which the recipe and the device fill in (resolve.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fbopt.train.config.dataspec import parse
from fbopt.train.config.recipes import RECIPES, is_stochastic

RecipeName = Literal[
    "sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong",
    "sgd-aug", "fb-aug", "fb-long-aug", "fb-clip-aug", "fb-penalty-aug", "fb-strong-aug",
    "fb-shuffled-aug",
    "sgd-x10", "fb-x10", "fb-long-x10", "fb-clip-x10", "fb-penalty-x10", "fb-strong-x10",
    "fb-penalty-x40",
]  # fmt: skip
ModelName = Literal[
    "cnn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet20", "resnet32", "resnet56", "resnet110", "vgg11", "vgg13", "vgg16", "vgg19",
    "densenet121", "densenet169",
]  # fmt: skip
Method = Literal["forward", "central", "exact"]
Accumulation = Literal["float32", "exact"]
Augment = Literal["none", "random", "fixed"]
Sampling = Literal["fixed", "shuffled", "replacement"]
Precision = Literal["fp32", "tf32", "bf16"]
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
    samples: int | None = None
    """Train on only so many samples, the first of the data set. Default: all."""
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
    """Samples per mini-batch (only for sgd, and before --switch-at)."""
    max_norm: float | None = None
    """Clip the gradient to this norm; inf for no clipping."""
    chunk_max_norm: float | None = None
    """Clip the gradient of every chunk, its penalty's included, to this norm too (not for sgd)."""
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
    additive_noise: float = 0.0
    """Deviation of normal noise that is added to every element of the clipped gradient (not for
    sgd)."""
    multiplicative_noise: float = 0.0
    """Deviation of normal noise around 1 that every element is multiplied by after that (not for
    sgd)."""
    norm_bias: float = 0.0
    """Strength of a pull of the norm of all parameters to --norm-bias-target (not for sgd)."""
    norm_bias_target: float = 0.0
    """The norm b of --norm-bias."""
    norm_bias_power: Literal[1, 2] = 1
    """What --norm-bias adds to the loss: 1, strength·| ‖θ‖² − b² |; 2, half its square."""
    decay: Literal["all", "weights"] | None = None
    """What decays: all parameters, or only the weights of convolutions and linear layers."""
    label_smoothing: float | None = None
    """Share of the target that is spread evenly over the classes, in training only."""
    dropout: float = 0.0
    """Probability with which an input of the last layer is dropped."""
    ema: float = 0.0
    """Evaluate a moving average of the weights, of which so much is kept after every pass."""
    stop_fitted: int = 0
    """Stop after so many passes in a row that classified every training sample right; 0: never."""
    switch_at: int = 0
    """Begin with so many epochs of mini-batch SGD, without a penalty (not for sgd itself)."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation: flip averages the probabilities of every test image and its mirror
    image."""
    precision: Precision | None = None
    """Arithmetic of the forward and backward passes; sums and updates stay in float32. fp32;
    tf32, for CUDA; bf16, autocast to bfloat16. Default: fp32 on the CPU, tf32 on CUDA."""
    channels_last: bool | None = None
    """Keep the channels of images last in memory, which convolutions are faster with. Default:
    True."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graph: bool | None = None
    """Capture the work on a chunk in a CUDA graph and replay it. Default: True on CUDA, except for
    sgd."""
    eval_every: int | None = None
    """Passes between two evaluations on the test set. Default: a hundredth of the run."""
    log_every: int | None = None
    """Passes between two lines of metrics.jsonl. Default: a four-hundredth of the run."""
    chunk_norms: bool = False
    """Log the mean squared gradient norm of chunks or mini-batches also where no penalty does."""
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
        return is_stochastic(self.recipe)

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


def implied(values: Mapping[str, Any]) -> dict[str, Any]:
    """What options that a run's version of fbopt did not have yet meant: what its recipe says."""
    recipe = RECIPES.get(values.get("scale"), {}).get(values.get("recipe"))
    if recipe is None:
        return {}
    return {**asdict(recipe), "precision": "fp32", "channels_last": True, "cuda_graph": False}


def flag(name: str) -> str:
    """The option of the command line that sets the field `name`."""
    return "--" + name.replace("_", "-")
