"""The options of `fbopt train`. The recipe and the device fill in what is left out (resolve.py)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from fbopt.train.config.dataspec import parse

RecipeName = Literal[
    "sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong", "fb-gradreg", "fb-sam", "fb-asam",
    "sgd-aug", "fb-aug", "fb-long-aug", "fb-clip-aug", "fb-penalty-aug", "fb-strong-aug",
    "fb-shuffled-aug", "fb-gradreg-aug", "fb-sam-aug", "fb-asam-aug",
    "sgd-x10", "fb-x10", "fb-long-x10", "fb-clip-x10", "fb-penalty-x10", "fb-strong-x10",
    "fb-gradreg-x10", "fb-sam-x10", "fb-asam-x10",
    "sgd-x40", "fb-x40", "fb-long-x40", "fb-clip-x40", "fb-penalty-x40", "fb-strong-x40",
    "fb-gradreg-x40", "fb-sam-x40", "fb-asam-x40",
]  # fmt: skip
ModelName = Literal[
    "cnn", "mlp", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet20", "resnet32", "resnet56", "resnet110", "vgg11", "vgg13", "vgg16", "vgg19",
    "densenet121", "densenet161", "densenet169", "densenet201", "pyramidnet110", "pyramidnet272",
    "nfnet-f0",
]  # fmt: skip
OptimizerName = Literal[
    "sgd", "adam", "adamw", "rmsprop", "sign", "normalized", "muon", "lars", "lbfgs",
]  # fmt: skip
TRACKED = ("sharpness", "noise", "batches")
EIGENVALUES = 20  # that can be tracked


class OptionsError(ValueError):
    """An option that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Options:
    """Train a network by full-batch gradient descent, or by SGD to compare.

    The recipe fills in what is not given, and the run folder records what was used. A pass is one
    visit to every training sample: one full-batch step, or one epoch of SGD.
    """

    GROUPS: ClassVar[dict[str, str]] = {  # title in the help: its first option
        "data": "data", "model": "model", "recipe": "recipe", "clipping": "max_norm",
        "second point": "perturbation", "update rule": "optimizer",
        "regularisation": "label_smoothing", "schedule": "lr", "precision": "precision",
        "as the authors' code": "as_released", "run": "seed",
    }  # fmt: skip

    data: str = "mnist1d"
    """Data set: mnist1d, digits, cifar10, cifar100, npz:PATH (arrays x_train, y_train, x_test,
    y_test), imagefolder:PATH (train/CLASS/IMAGE and test/CLASS/IMAGE), tinyimagenet:PATH (as it is
    unpacked) or imagenet:PATH (train/CLASS/IMAGE and val/CLASS/IMAGE, decoded once into files that
    need not fit into memory)."""
    data_dir: Path | None = None
    """Folder with the files of cifar10 or cifar100. Default: data."""
    download: bool = False
    """Download cifar10 or cifar100 if the folder does not hold them."""
    image_size: int | None = None
    """Side in pixels of the images of folders, which are resized to it; for imagenet that of the
    crops. Default: 64 for tinyimagenet, 224 for imagenet, else 32."""
    samples: int | None = None
    """Train on this many samples only, the first of the data set. Default: all."""
    validation: float = 0.0
    """Share of the training samples to hold out, to choose hyperparameters by: the same ones in
    every run, taken by a fixed shuffle before --samples. Evaluations are of them; the test set is
    looked at once, after the last step. 0 for none."""
    test: Literal["always", "last", "never"] | None = None
    """Evaluations of the test set: always, with every other; after the last step; or never, for
    runs that hyperparameters are chosen by. Default: last with --validation, else always."""
    augment: Literal["none", "random", "fixed"] | None = None
    """Random crops (after padding by --padding black pixels; for imagenet, resized crops of 8 to
    100 % of the area) and horizontal flips of the training images: none; random, new ones in every
    pass; fixed, the same few of every image in every pass: an enlarged data set that is never
    stored. sgd visits one of these replicas per epoch."""
    replicas: int | None = None
    """Crops of every image for --augment fixed. Default: from the recipe, else 10."""
    with_clean: bool = False
    """For --augment fixed: make the first replica the images as they are."""
    padding: int | None = None
    """Black pixels around an image before a crop. Default: 8 for tinyimagenet, else 4."""
    augment_policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """What changes every crop further, for --augment random or fixed: RandAugment or TrivialAugment
    of torchvision."""
    chunks: Literal["fixed", "shuffled", "replacement"] | None = None
    """Assignment of samples to chunks or mini-batches: fixed, in the order of the data; shuffled,
    in a new order every pass; replacement, drawn with replacement. Mini-batches before --switch-at
    are shuffled."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation: flip averages the probabilities of a test image and its mirror
    image."""
    model: ModelName | None = None
    """Network: a small CNN or a multilayer perceptron, without BatchNorm; or, for images, the
    paper's ResNets (18 to 152), He et al.'s for CIFAR (20 to 110), VGGs with BatchNorm, DenseNets,
    PyramidNets, NFNet-F0."""
    width: int | None = None
    """Channels of the first layer; the widths of all others follow; of mlp the outputs of every
    hidden layer. Default: 25 for cnn, 16 for
    resnet20 to resnet110 and PyramidNets, 96 for densenet161, 128 for nfnet-f0, else 64."""
    dropout: float = 0.0
    """Probability of dropping an input of the last layer."""
    stem: Literal["cifar", "imagenet"] | None = None
    """First layers of resnet18 to resnet152, DenseNets and nfnet-f0: cifar, a 3×3 convolution;
    imagenet, as published for ImageNet, which makes images a quarter as wide. Default: imagenet for
    --data imagenet:PATH, else cifar."""
    norm: Literal["batch", "group", "ghost", "skipinit"] | None = None
    """Normalisation in the ResNets: batch; group, GroupNorm with 32 groups; ghost, BatchNorm over
    sub-batches of a chunk; skipinit, none, and a learnable factor that starts at 0 at the end of
    every block. Default: batch."""
    ghost_size: int | None = None
    """Samples per sub-batch of --norm ghost. Default: 32."""
    shortcut: Literal["A", "B", "C", "pool"] | None = None
    """Shortcuts of the ResNets, as He et al. name them: A, without parameters; B, a 1×1 convolution
    where the shape changes; C, one in every block; pool, B with an average pool for its stride.
    Default: pool for resnet18 to resnet152, A for resnet20 to resnet110."""
    widening: int | None = None
    """Channels that a PyramidNet adds from its first to its last block, at --width 16. Default: 84
    for pyramidnet110, 200 for pyramidnet272."""
    depth: int | None = None
    """Hidden layers of mlp. Default: 2."""
    activation: Literal["relu", "tanh", "gelu"] | None = None
    """Activation of mlp. Default: relu."""
    recipe: RecipeName = "fb-penalty"
    """Row of the paper's ladder to follow; `fbopt recipes` lists their hyperparameters."""
    scale: Literal["images", "small"] | None = None
    """Version of the recipe: the paper's for images, or one scaled down for small data sets.
    Default: small for mnist1d, digits and npz:PATH, else images."""
    chunk_size: int | None = None
    """Samples per forward and backward pass of a full-batch step (not for sgd). It defines the
    penalty and BatchNorm's batch: part of the method, not only a matter of memory."""
    batch_size: int | None = None
    """Samples per mini-batch (only for sgd, and before --switch-at)."""
    max_norm: float | None = None
    """Clip the gradient to this norm; inf for no clipping."""
    clip_history: int | None = None
    """Clip the gradient to the largest of its norms in this many steps before; the first step is
    not clipped. In place of the recipe's --max-norm; with one of your own, to the smaller bound.
    Default: none."""
    norm_type: Literal["inf"] | float = 2.0
    """The p of the p-norm that is clipped, inf for the largest element."""
    agc: float | None = None
    """Adaptive clipping, before the other: scale the gradient of every output unit down to this
    share of the norm of its weights (at least 0.001); biases are one unit each, and the last linear
    layer is left out. Default: none."""
    chunk_max_norm: float | None = None
    """Clip the gradient of every chunk, its penalty's included, to this norm too (not for sgd).
    Default: no clipping."""
    perturbation: Literal["none", "penalty", "gnp", "sam", "asam"] | None = None
    """Why the gradient of every chunk or mini-batch is taken at a second point, too: penalty, on
    the squared gradient norm; gnp, on the norm; sam, sharpness-aware minimization; asam, the same
    in units of the parameters; or none. Default: from the recipe, penalty with --penalty."""
    penalty: float | None = None
    """Strength of penalty and gnp, λ = lr·strength/4; 0 for none."""
    full_penalty: float | None = None
    """Strength of a penalty on the squared norm of the whole gradient, beside the chunks' (not for
    sgd); every step visits all chunks once before. Default: 0."""
    radius: float | None = None
    """Length of the finite-difference step of penalty and gnp; exact products have none."""
    method: Literal["forward", "central", "exact"] | None = None
    """Differences: forward, or central, which takes a third gradient; or, for penalty and gnp,
    exact products with the Hessian, by a second backward pass."""
    rho: float | None = None
    """Length of the step to the second point of sam and asam. Default: 0.05 and 0.5."""
    scope: Literal["chunk", "full"] | None = None
    """Gradient that leads to that point: the chunk's or mini-batch's own; or that of all chunks,
    for which every step visits them once before (not for sgd). Default: chunk."""
    sam_share: float | None = None
    """Share of the gradient at that point; the rest is the gradient at the parameters. Default:
    1."""
    optimizer: OptimizerName = "sgd"
    """Update rule, of full-batch steps and mini-batches: sgd, adam, adamw, rmsprop and muon as in
    torch (muon for the weights of convolutions, as matrices, and of linear layers but the last; the
    rest by adamw); sign and normalized step along the signs and along the unit vector of the
    gradient; lars sizes the step of every layer by its weights; lbfgs follows the last steps and
    changes of the gradient (not for mini-batches), at a constant rate of 1."""
    line_search: Literal["strong_wolfe", "armijo", "nonmonotone", "none"] | None = None
    """Search for the length of every full-batch step of sgd and lbfgs: until Wolfe's strong
    conditions hold; Armijo's; or Armijo's for the largest of the last ten values. Default:
    strong_wolfe for lbfgs, else none."""
    history: int | None = None
    """Pairs of steps and changes that lbfgs keeps. Default: 10."""
    iterations: int | None = None
    """Most iterations in one step of lbfgs. Default: 20."""
    momentum: float | None = None
    """Momentum (for sgd, lars, rmsprop, muon); 0 for none. Default: from the recipe for sgd and
    lars; 0 for rmsprop, 0.95 for muon."""
    nesterov: bool | None = None
    """Nesterov's variant of momentum (for sgd, muon). Default: from the recipe; True for muon."""
    beta1: float | None = None
    """Decay of the mean of gradients (for adam, adamw, muon's rest). Default: 0.9."""
    beta2: float | None = None
    """Decay of the mean of squared gradients (for the same). Default: 0.999."""
    eps: float | None = None
    """Number added to the root of that mean (for the same, rmsprop). Default: 1e-8."""
    alpha: float | None = None
    """Decay of the mean of squared gradients (for rmsprop). Default: 0.99."""
    trust: float | None = None
    """Trust coefficient (for lars): the share of the norm of a layer's weights that is the length
    of its step at rate 1. Default: 0.001."""
    weight_decay: float | None = None
    """L2 regularisation, as in torch.optim.SGD; for adamw and muon decoupled. Default: from the
    recipe; 0.01 for adamw, 0.1 for muon."""
    decay: Literal["all", "weights"] | None = None
    """Parameters that decay: all, or only the weights of convolutions and linear layers."""
    label_smoothing: float | None = None
    """Share of the target that is spread evenly over the classes, in training only."""
    loss: Literal["cross-entropy", "misclassified", "squared"] = "cross-entropy"
    """Loss of a sample in training: its cross-entropy; misclassified, the same, but 0 for samples
    that are classified correctly; squared, half the squared distance of its outputs from the
    one-hot vector of its label, in evaluations, too."""
    max_up: int = 1
    """Views (crops and flips) of every sample in each pass, of which the one with the largest loss
    counts (max-up), for --augment random; 1 for no such maximum."""
    ema: float = 0.0
    """Evaluate an exponential moving average of the weights that keeps this share of itself after
    every pass."""
    additive_noise: float = 0.0
    """Standard deviation of the normal noise added to every element of the clipped gradient (not
    for sgd)."""
    multiplicative_noise: float = 0.0
    """Standard deviation of the normal noise around 1 that then multiplies every element (not for
    sgd)."""
    norm_bias: float = 0.0
    """Strength of a term in the loss that pulls the norm of all parameters to --norm-bias-target
    (not for sgd)."""
    norm_bias_target: float = 0.0
    """The norm b of --norm-bias."""
    norm_bias_power: Literal[1, 2] = 1
    """Form of that term: 1, strength·| ‖θ‖² − b² |; 2, half its square."""
    lr: float | None = None
    """Peak learning rate. Default: from the recipe for sgd; 10 for lars, 1 for lbfgs, 0.1 for
    normalized, 0.01 for rmsprop, 0.001 for the others."""
    steps: int | None = None
    """Full-batch steps (not for sgd). Warm-up and cosine scale with it unless given."""
    epochs: int | None = None
    """Epochs (only for sgd). Warm-up and cosine scale with it unless given."""
    warmup: int | None = None
    """Passes over which the learning rate rises linearly."""
    cosine: int | None = None
    """Passes after the warm-up in which a cosine would take the learning rate to zero."""
    schedule: Literal["cosine", "step", "exponential", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine; step, times --gamma at each of --milestones;
    exponential, times --gamma after every pass; constant, its peak."""
    floor: float = 0.0
    """Share of the peak learning rate at which the cosine ends."""
    milestones: str | None = None
    """Shares of all passes after which --schedule step lowers the learning rate. Default:
    0.375,0.625,0.875."""
    gamma: float | None = None
    """Factor of --schedule step and exponential. Default: 0.1 for step, 0.99 for exponential."""
    switch_at: int = 0
    """Begin with this many epochs of mini-batch SGD, without a penalty (not for sgd itself)."""
    stop_fitted: int = 0
    """Stop after this many passes in a row that classified every training sample correctly; 0 for
    never."""
    precision: Literal["fp32", "tf32", "bf16", "fp64"] | None = None
    """Arithmetic of the forward and backward passes (sums and updates stay in float32): fp32; tf32,
    for CUDA; bf16, autocast to bfloat16; fp64, everything in float64, data, parameters, sums and
    updates too. Default: fp32 on the CPU, tf32 on CUDA."""
    accumulation: Literal["exact", "float32"] | None = None
    """Sums of gradients over chunks (not for sgd): exact, in integers, with the same bits for any
    order of the chunks and any number of processes; or in float32. Default: exact."""
    channels_last: bool | None = None
    """Keep the channels of images last in memory, which makes convolutions faster. Default:
    True."""
    compile: bool = False
    """Compile the passes over a chunk, or over K at once, with torch.compile, which takes up to
    minutes before the first step; for sgd, the model."""
    vectorize: int | None = None
    """Number K of chunks of one size that go through the model at once (not for sgd); 1 for one by
    one. It changes the result by rounding, and the draws of --dropout. Default: 32 for the small
    CNN on mnist1d and digits in chunks of at most 32, else 1."""
    cuda_graph: bool | None = None
    """Capture the work on a chunk in a CUDA graph and replay it. Default: True on CUDA, except for
    sgd."""
    as_released: bool = False
    """Follow the code that the authors released where it differs from their paper, or from what one
    would expect: all options of this group that have an effect."""
    mean: Literal["samples", "running"] | None = None
    """Mean gradient over chunks: of all samples; or running, a ← a + (g − a)/N after each of N
    chunks, which weighs the last 2.7 times the first, and all with 0.63 (the loss that is logged,
    and BatchNorm's statistics, are weighted likewise). Default: samples."""
    last_chunk: Literal["keep", "drop"] | None = None
    """Keep or drop a last chunk or mini-batch that is smaller than the others. Default: keep."""
    residual_init: Literal["zero", "one"] | None = None
    """Initial scale of the last BatchNorm of a block of resnet18 to resnet152. Default: zero."""
    first_rate: Literal["positive", "zero"] | None = None
    """Learning rate of the first pass of a warm-up: a pass's share of the peak; or zero. Default:
    positive."""
    batchnorm: Literal["mean", "every-pass"] | None = None
    """Running statistics of BatchNorm: the mean over the chunks of a step; or an exponential
    average over every pass in turn, those at perturbed parameters too. Default: mean."""
    central_radius: Literal["full", "half"] | None = None
    """Part of --radius that central differences go to each side. Default: full."""
    smoothing: Literal["all", "others"] | None = None
    """Classes over which --label-smoothing spreads its share: all, or all but the right one.
    Default: all."""
    seed: int = 0
    """Seed of the initial weights and of every random draw: the order of the samples, crops, flips
    and dropout masks."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is cuda if there is one."""
    threads: int | None = None
    """Threads that torch computes with, in each process. Default: 1 for the small CNN on small
    data, which more would slow down, else torch's own choice."""
    processes: Literal["auto"] | int = "auto"
    """Processes that share the chunks of every step (not for sgd), started on the CPU of this
    machine. With exact sums the result has the same bits for any number. auto: as many as there are
    cores for, where one thread is the default; else 1."""
    timeout: float | None = None
    """Minutes for which a process waits for the others, before the run ends, and a ladder for a run
    that computes nothing. Default: 30."""
    out: Path | None = None
    """Folder to write. Default: runs/DATA-RECIPE-sSEED."""
    overwrite: bool = False
    """Replace a run that is already in the folder."""
    resume: Literal["auto"] | Path | None = None
    """Continue the interrupted run in this folder, with its own options; auto: continue the run
    that the other options define, or start it if there is none yet. Default: a new run."""
    eval_every: int | None = None
    """Passes between two evaluations of what was not trained on. Default: a hundredth of the
    run."""
    log_every: int | None = None
    """Passes between two lines of metrics.jsonl. Default: a four-hundredth of the run."""
    log: Literal["tensorboard"] | None = None
    """Write the metrics as TensorBoard's scalars too, into the run folder: look at them with
    `tensorboard --logdir runs`."""
    chunk_norms: bool = False
    """Log the mean squared gradient norm of chunks or mini-batches even without a penalty."""
    track: str = ""
    """Measures to add to the metrics and curves, such as sharpness,noise: the largest eigenvalue of
    the full-batch Hessian (for adam, adamw and rmsprop, preconditioned; sharpness:3 for the largest
    three) beside the threshold of stability, where it is known, and the gradient noise scale.
    batches: the mean curvature of mini-batches along their own gradients (batch sharpness)."""
    every: int | None = None
    """Passes between two measurements of --track. Default: as --eval-every."""
    save_every: int | None = None
    """Optimizer steps between two checkpoints. Default: one every five minutes."""
    keep: int | None = None
    """Checkpoints to keep, the newest. Default: 2."""
    fingerprint_every: int | None = None
    """Steps between two lines of fingerprints.jsonl; 0: only with checkpoints. Default: 0."""

    @property
    def tracked(self) -> tuple[str, ...]:
        """The measures that `track` names."""
        return tuple(name for name, _ in self._measures)

    @property
    def eigenvalues(self) -> int:
        """How many of the Hessian's eigenvalues `track` asks for; raises OptionsError."""
        counts = [1]
        for name, count in self._measures:
            whole = count.isdecimal() and count.isascii() and len(count) < 4
            if count and not (name == "sharpness" and whole and 1 <= int(count) <= EIGENVALUES):
                raise OptionsError(
                    f"--track {name}:{count}: a count is for sharpness alone, from 1 to "
                    f"{EIGENVALUES}, as in sharpness:3"
                )
            counts += [int(count)] if count else []
        return max(counts)

    @property
    def _measures(self) -> list[tuple[str, str]]:
        """Names and counts in `track`, NAME[:COUNT] with commas between; "" for no count."""
        words = [word.partition(":") for word in self.track.split(",") if word.strip()]
        # A colon without a count is kept, and refused.
        return [(name.strip(), count.strip() or colon) for name, colon, count in words]

    @property
    def milestone_shares(self) -> tuple[float, ...]:
        """The numbers that `milestones` lists; raises OptionsError."""
        try:
            shares = tuple(float(word) for word in (self.milestones or "").split(",") if word)
        except ValueError as error:
            raise OptionsError(
                f"--milestones {self.milestones}: numbers with commas between, as in 0.5,0.75"
            ) from error
        if not all(0 < share < 1 for share in shares):
            raise OptionsError(
                f"--milestones {self.milestones}: each has to be above 0 and below 1"
            )
        return shares

    @property
    def stochastic(self) -> bool:
        """Whether the recipe is mini-batch SGD rather than full-batch gradient descent."""
        return self.recipe.startswith("sgd")

    def evaluated(self, last: bool) -> tuple[str, ...]:
        """The splits that an evaluation looks at; `last`, the one after the last step."""
        own = ("validation",) if self.validation else ()
        when = self.test or ("last" if self.validation else "always")
        return (*own, "test") if when == "always" or (last and when == "last") else own

    @property
    def passes(self) -> int:
        """Visits to every training sample, in resolved options: epochs, or full-batch steps."""
        return self.epochs if self.stochastic else self.steps

    @property
    def folder(self) -> Path:
        """The run folder: `out`, or runs/DATA-RECIPE-sSEED."""
        return Path(self.out or f"runs/{self.data_name}-{self.recipe}-s{self.seed}")

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
        """The options that `as_json` returned."""
        names = ("out", "resume", "data_dir")
        paths = {k: Path(values[k]) for k in names if values.get(k) not in (None, "auto")}
        return cls(**{**values, **paths})


def flag(name: str) -> str:
    """The option of the command line that sets the field `name`."""
    return "--" + name.replace("_", "-")


def literals(hint: Any) -> tuple[Any, ...]:
    """The values of the Literal in a type hint such as `Literal["a", "b"] | None`; () if none."""
    return tuple(
        v for h in (hint, *get_args(hint)) if get_origin(h) is Literal for v in get_args(h)
    )
