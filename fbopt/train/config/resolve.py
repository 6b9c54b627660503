"""Fill in the options that were left out, from the recipe and the device, and check them all."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_type_hints

from fbopt.train.config.as_released import resolve_switches
from fbopt.train.config.dataspec import default_size, parse, scale_of
from fbopt.train.config.line_search import resolve_search
from fbopt.train.config.networks import layers
from fbopt.train.config.options import TRACKED, Options, OptionsError, flag, literals
from fbopt.train.config.paths import path_of
from fbopt.train.config.perturbation import resolve_perturbation
from fbopt.train.config.recipes import RECIPES, Recipe, chunks_at_once
from fbopt.train.config.rules import check_clipping, check_rule, own_values

FOLDERS = ("imagefolder", "tinyimagenet", "imagenet")
# The fastest settings of a type of device that cost no accuracy.
SPEED = {
    "cpu": {"precision": "fp32", "channels_last": True, "cuda_graph": False},
    "cuda": {"precision": "tf32", "channels_last": True, "cuda_graph": True},
}


def resolve(options: Options) -> Options:
    """Fill in everything that was left out, from the recipe and the device, and check the result.

    An option without effect becomes None (or False): `max_norm` without clipping; those of a
    perturbation that is not chosen; `replicas` without fixed augmentation; `vectorize` 1.
    """
    check(options)
    scale = options.scale or scale_of(options.data)
    recipe = RECIPES[scale][options.recipe]
    device = device_type(options.device)
    check_device(options, device)
    given = {k: v for k, v in asdict(options).items() if v is not None}
    rule = own_values(options.optimizer)
    values = dict.fromkeys(asdict(options)) | recipe | rule | SPEED[device] | given
    if options.clip_history:
        values["max_norm"] = options.max_norm
    values |= layers(options, values["model"]) | _passes(options, recipe, values)
    values |= resolve_perturbation(options, values)
    if values["every"] is None:
        values["every"] = values["eval_every"] if options.tracked else 0
    values["test"] = options.test or ("last" if options.validation else "always")
    if values["augment"] == "fixed":
        values["replicas"] = values["replicas"] or 10
    kind = parse(options.data)[0]
    values["image_size"] = values["image_size"] or default_size(options.data)
    if values["padding"] is None and values["augment"] != "none" and kind != "imagenet":
        values["padding"] = 8 if kind == "tinyimagenet" else 4
    if options.momentum == 0 and values["nesterov"] is not None:
        values["nesterov"] = bool(options.nesterov)
    if scale == "small" and values["model"] in ("cnn", "mlp"):
        values["threads"] = values["threads"] or 1
    if options.stochastic:
        values["cuda_graph"] = False
    else:
        values["accumulation"] = values["accumulation"] or "exact"
        values["vectorize"] = values["vectorize"] or chunks_at_once(values)
    if options.switch_at:
        values["batch_size"] = values["batch_size"] or RECIPES[scale]["sgd"]["batch_size"]
    values |= resolve_search(options, values)
    values |= resolve_switches(options, values)
    check_effect(options, values)
    check_clipping(options, values)
    return Options(**values | _without_effect(values) | {"scale": scale})


def _passes(options: Options, recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """The schedule in proportion to the number of passes, and how often to log and save."""
    passes = values["epochs"] if options.stochastic else values["steps"]
    share = passes / (recipe["epochs"] if options.stochastic else recipe["steps"])
    found = {
        "warmup": round(recipe["warmup"] * share),
        "cosine": max(1, round(recipe["cosine"] * share)),
        "eval_every": max(1, passes // 100),
        "log_every": max(1, passes // 400),
        "keep": 2,
        "fingerprint_every": 0,
        "gamma": {"step": 0.1, "exponential": 0.99}.get(options.schedule),
        "milestones": "0.375,0.625,0.875" if options.schedule == "step" else None,
    }
    return {k: v for k, v in found.items() if getattr(options, k) is None}


def _without_effect(values: dict[str, Any]) -> dict[str, Any]:
    """The options that have no effect, as None (or False)."""
    found = {k: None for k in ("max_norm", "chunk_max_norm") if values[k] == math.inf}
    if values["augment"] != "fixed":
        found |= {"replicas": None, "with_clean": False}
    if values["vectorize"] == 1:
        found |= {"vectorize": None}
    if values["schedule"] != "cosine":
        found |= {"cosine": None}
    return found


def device_type(name: str) -> str:
    """The type of a `--device`: "cuda" or "cpu"."""
    if name == "auto":
        import torch  # imported here: help and mistyped options should not wait for it

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name.partition(":")[0] == "cuda" else "cpu"


_SGD_ONLY = ("epochs", "batch_size")
_FULL_BATCH_ONLY = (
    "steps", "chunk_size", "full_penalty", "chunk_max_norm", "switch_at", "additive_noise",
    "multiplicative_noise", "norm_bias", "cuda_graph", "accumulation", "vectorize",
)  # fmt: skip
_INSTEAD = {
    "epochs": "use --steps",
    "batch_size": "use --chunk-size",
    "steps": "use --epochs",
    "chunk_size": "use --batch-size",
    "accumulation": "it is for sums over chunks, of which sgd has none, so leave it out",
    "chunk_max_norm": "use --max-norm, which clips every mini-batch",
    "vectorize": "it is for chunks, of which sgd has none, so leave it out",
}
_COUNTS = """width image_size samples replicas threads steps epochs cosine chunk_size batch_size
vectorize eval_every log_every save_every keep clip_history ghost_size widening depth max_up
history iterations"""
_NOT_NEGATIVE = """seed padding warmup penalty full_penalty weight_decay fingerprint_every
stop_fitted switch_at additive_noise multiplicative_noise norm_bias norm_bias_target every eps"""
# Lower bound, whether the bound itself is allowed, upper bound (never allowed). Counts of what is
# done one after the other need none for memory's sake, but have to fit into 64 bits.
AT_LEAST_1, AT_LEAST_0, ABOVE_0 = (1, True, 10**15), (0, True, math.inf), (0, False, math.inf)
_MOST = {  # of what is allocated, or started, at once
    "threads": 10**4, "padding": 10**4, "image_size": 10**5, "clip_history": 10**7, "max_up": 10**6,
    "replicas": 10**9, "history": 10**9, "depth": 10**4,
}  # fmt: skip
_BOUNDS = {
    **dict.fromkeys(_COUNTS.split(), AT_LEAST_1),
    **dict.fromkeys(_NOT_NEGATIVE.split(), AT_LEAST_0),
    **dict.fromkeys(("timeout", "lr", "radius", "rho", "sam_share", "agc", "trust"), ABOVE_0),
    **dict.fromkeys(
        ("validation", "momentum", "dropout", "label_smoothing", "ema", "floor"),
        (0, True, 1),
    ),
    **dict.fromkeys(("beta1", "beta2", "alpha"), (0, True, 1)),
    "gamma": (0, False, 1),
    **{name: (int(name != "padding"), True, most) for name, most in _MOST.items()},
}


def check(options: Options) -> None:
    """Raise OptionsError or DataError for values that cannot work, before reading or writing."""
    for name, hint in get_type_hints(Options).items():
        allowed, value = literals(hint), getattr(options, name)
        others = name in ("resume", "processes", "norm_type")  # also paths, also numbers
        if allowed and value is not None and value not in allowed and not others:
            words = ", ".join(map(str, allowed))
            raise OptionsError(f"{flag(name)} {value}: choose {words}")
    check_bounds(options, _BOUNDS)
    for name in ("max_norm", "chunk_max_norm"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise OptionsError(f"{flag(name)} {value}: has to be above 0; inf for no clipping")
    if options.norm_type != "inf" and not 0 < options.norm_type < math.inf:
        raise OptionsError(f"--norm-type {options.norm_type}: has to be above 0, or inf")
    if options.seed >= 2**63:
        raise OptionsError(f"--seed {options.seed}: has to be below 2**63")
    if options.resume == "auto" and options.overwrite:
        raise OptionsError("--overwrite contradicts --resume auto; leave one of them out")
    if options.milestones is not None and not options.milestone_shares:
        raise OptionsError("--milestones: name at least one, as in 0.5,0.75")
    _check_processes(options)
    _check_belongs(options)
    check_rule(options)
    _check_tracked(options)
    _check_data(options)


def check_paths(options: Options) -> None:
    """Raise OptionsError for paths that the system could never follow."""
    for name in ("data_dir", "out", "resume"):
        if (value := getattr(options, name)) not in (None, "auto"):
            try:
                path_of(str(value))
            except ArgumentTypeError as error:
                raise OptionsError(f"{flag(name)}: {error}") from error


def check_bounds(options: Any, bounds: Mapping[str, tuple[float, bool, float]]) -> None:
    """Raise OptionsError for a value outside its bounds; None is allowed."""
    for name, (low, closed, high) in bounds.items():
        value = getattr(options, name)
        if value is None or ((low <= value if closed else low < value) and value < high):
            continue
        words = f"{'at least' if closed else 'above'} {low}"
        words += " and finite" if math.isinf(high) else f" and below {high:,}"
        raise OptionsError(f"{flag(name)} {value}: has to be {words}")


def _check_belongs(options: Options) -> None:
    """Refuse options that the chosen recipe would silently ignore."""
    if options.stochastic:
        refused, other = _FULL_BATCH_ONLY, "a full-batch recipe such as --recipe fb-penalty"
    else:
        refused, other = _SGD_ONLY[: 1 if options.switch_at else 2], "--recipe sgd"
    for name in refused:
        if (value := getattr(options, name)) and value != getattr(Options, name):
            raise OptionsError(
                f"{flag(name)} is only for {other}, not for --recipe "
                f"{options.recipe}; {_INSTEAD.get(name, 'leave it out')}"
            )


def _check_processes(options: Options) -> None:
    number = options.processes
    if number == "auto" or number == 1:
        return
    if not isinstance(number, int) or number < 1:
        raise OptionsError(f"--processes {number}: has to be auto, or at least 1")
    if options.stochastic or options.switch_at:
        whose = "sgd's" if options.stochastic else "--switch-at's"
        raise OptionsError(
            f"--processes {number}: {whose} mini-batches are taken in one process; leave it out, "
            "or choose a full-batch recipe"
        )


def _check_tracked(options: Options) -> None:
    if unknown := [name for name in options.tracked if name not in TRACKED]:
        raise OptionsError(
            f"--track {unknown[0]}: choose {', '.join(TRACKED)}, with commas between"
        )
    _ = options.eigenvalues  # raises OptionsError
    if options.every and not options.tracked:
        raise OptionsError("--every goes with --track; add --track sharpness,noise")
    if options.every == 0 and options.tracked:
        raise OptionsError("--every 0: has to be at least 1")


def _check_data(options: Options) -> None:
    kind, _ = parse(options.data)
    for name in ("data_dir", "download"):
        if getattr(options, name) and not kind.startswith("cifar"):
            raise OptionsError(
                f"{flag(name)} is only for --data cifar10 and cifar100; leave it out"
            )
    if options.test == "never" and not options.validation:
        raise OptionsError(
            "--test never: nothing would be evaluated; add --validation 0.1, or leave it out"
        )
    if options.image_size not in (None, default_size(options.data)) and kind not in FOLDERS:
        raise OptionsError(
            f"--image-size is only for folders of images, --data {', '.join(FOLDERS)}; leave it out"
        )
    if kind == "imagenet" and options.padding is not None:
        raise OptionsError(
            "--padding is for crops of whole images, and those of --data imagenet:PATH are "
            "resized; leave it out"
        )


def check_effect(given: Options, values: dict[str, Any]) -> None:
    """Refuse options that have no effect, or exclude each other, given the values of the recipe."""
    needs = (
        (values["augment"] == "fixed", ("replicas", "with_clean"), "--augment fixed; add it"),
        (given.norm_bias, ("norm_bias_target", "norm_bias_power"), "--norm-bias; add it"),
        (given.schedule == "cosine", ("cosine", "floor"), "--schedule cosine; leave it out"),
        (given.schedule == "step", ("milestones",), "--schedule step; add it"),
        (given.schedule in ("step", "exponential"), ("gamma",),
         "--schedule step or exponential; add it"),
        (values["augment"] == "random", ("max_up",), "--augment random; add it"),
        (values["augment"] != "none", ("padding", "augment_policy"),
         "--augment random or fixed; add it"),
    )  # fmt: skip
    for present, names, need in needs:
        for name in names:
            if not present and getattr(given, name) != getattr(Options, name):
                raise OptionsError(f"{flag(name)} has no effect without {need}")
    if values["nesterov"] and values["momentum"] == 0:
        raise OptionsError("--nesterov needs momentum; give --momentum 0.9 or --nesterov False")
    if given.switch_at >= (values["steps"] or math.inf):
        raise OptionsError(
            f"--switch-at {given.switch_at}: has to be below --steps {values['steps']}, or no "
            "full-batch step is left; for SGD alone use --recipe sgd"
        )


def check_device(given: Options, device: str) -> None:
    """Refuse what only CUDA supports on the CPU."""
    if device == "cpu" and given.precision == "tf32":
        raise OptionsError(
            "--precision tf32 is for CUDA, and this run is on the CPU; give fp32, or bf16"
        )
    if device == "cpu" and given.cuda_graph:
        raise OptionsError("--cuda-graph True is for CUDA, not for the CPU; leave it out")
