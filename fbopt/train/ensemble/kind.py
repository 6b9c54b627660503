"""Which runs can be trained at once: full-batch gradient descent on plain gradients, and the same
in all but seeds and numbers. Everything else is refused before anything is written.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, OptionsError, flag
from fbopt.train.config.sweep import differing
from fbopt.train.memory import check_fits
from fbopt.train.torchrun import rank_and_world_size

ALONE = "train it alone, without --seeds and --grid"
# Resolved options and the values with which runs can be trained at once.
NEEDED: dict[str, tuple[Any, ...]] = {
    "switch_at": (0,),
    "optimizer": ("sgd",),
    "line_search": (None,),
    "augment": ("none",),
    "dropout": (0.0,),
    "agc": (None,),
    "clip_history": (None,),
    "chunk_max_norm": (None,),
    "full_penalty": (None,),
    "scope": (None, "chunk"),
    "method": (None, "forward", "central"),
    "perturbation": (None, "gnp", "sam"),
    "mean": (None, "samples"),
    "batchnorm": (None, "mean"),
    "additive_noise": (0.0,),
    "multiplicative_noise": (0.0,),
    "norm_bias": (0.0,),
    "ema": (0.0,),
    "stop_fitted": (0,),
    "precision": ("fp32", "tf32", "fp64"),
    "accumulation": ("float32",),
    "processes": (1,),
    "cuda_graph": (None, False),
}
WHY = {
    "accumulation": "exact sums are for a run alone; leave it out, for float32 sums",
    "processes": "all networks are trained in one process; leave it out",
    "cuda_graph": "steps of many networks are not captured; leave it out",
}


def opened(options: Options) -> Options:
    """Options with what many runs have where it is not given: float32 sums, and one process.

    Raises OptionsError for those that no other value could help.
    """
    if rank_and_world_size()[1] > 1:
        raise OptionsError(
            "--seeds and --grid: all networks are trained in one process; start it without torchrun"
        )
    if options.stochastic:
        raise OptionsError(
            f"--recipe {options.recipe}: full-batch recipes alone are trained at once; {ALONE}, or "
            "choose --recipe fb"
        )
    has_own = options.resume not in (None, "auto")  # those of the folder
    return replace(
        options,
        accumulation=options.accumulation or (None if has_own else "float32"),
        processes=1 if options.processes == "auto" else options.processes,
        cuda_graph=bool(options.cuda_graph),
    )


def check_each(options: Options) -> None:
    """Refuse resolved options that cannot be trained together with others. Raises OptionsError."""
    for name, values in NEEDED.items():
        if (value := getattr(options, name)) not in values:
            why = WHY.get(name, f"is not among what can be trained at once; {ALONE}")
            raise OptionsError(f"{flag(name)} {value}: {why}")


def check_together(all_options: Sequence[Options]) -> None:
    """Refuse resolved options that differ in what the networks share, or share what they must not.

    Raises OptionsError.
    """
    if not all_options:
        raise OptionsError("no options: give those of one run at least")
    for name, one, other in differing(list(all_options)):
        raise OptionsError(
            f"{flag(name)} {one} and {other}: networks that are trained at once share it; train "
            "them by separate commands"
        )
    methods = {o.method for o in all_options} - {None}
    if len(methods) > 1:
        raise OptionsError(
            f"--method {' and '.join(sorted(methods))}: networks that are trained at once share "
            "it; train them by separate commands"
        )
    folders = Counter(RunFolder(o.folder).path.absolute() for o in all_options)
    folder, count = folders.most_common(1)[0]
    if count > 1:
        raise OptionsError(f"--out {folder}: {count} runs would write it; give each its own")


def check_model(
    model: nn.Module, shape: tuple[int, ...], count: int, options: Options, device: torch.device
) -> None:
    """Refuse networks whose chunks depend on more than parameters, and so many of them that a pass
    does not fit into memory. Raises OptionsError.

    Args:
        model: one of them.
        shape: of a sample.
        count: the number of networks.
        options: resolved, of one of them.
        device: where they are.
    """
    name = options.model
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise OptionsError(
                f"--model {name}: has BatchNorm, whose statistics are of one network; choose cnn "
                f"or mlp, or --norm group or skipinit for a ResNet, or {ALONE}"
            )
    if any(True for _ in model.buffers()):
        raise OptionsError(
            f"--model {name}: has buffers, which are of one network; choose cnn or mlp, or {ALONE}"
        )
    samples = count * options.chunk_size * (options.vectorize or 1)
    check_fits(options, copy.deepcopy(model).to("meta").float(), shape, samples, device)
