"""Which networks have which of the options of layers, and what those are by default."""

from __future__ import annotations

from typing import Any

from fbopt.train.config.dataspec import parse
from fbopt.train.config.options import Options, OptionsError, flag

LAYERS = ("stem", "norm", "ghost_size", "shortcut", "widening", "depth", "activation")
_RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))
_CIFAR_RESNETS = tuple(f"resnet{depth}" for depth in (20, 32, 56, 110))
_WIDENING = {"pyramidnet110": 84, "pyramidnet272": 200}
_WHOSE = {
    "stem": "resnet18 to resnet152, DenseNets and nfnet-f0",
    "norm": "ResNets",
    "ghost_size": "ResNets with --norm ghost",
    "shortcut": "ResNets",
    "widening": "PyramidNets",
    "depth": "mlp",
    "activation": "mlp",
}


def layers(options: Options, model: str) -> dict[str, Any]:
    """The options of layers with the defaults of the network `model`; None for what it has not.

    Raises OptionsError for one that is given and that the network has not.
    """
    found = dict.fromkeys(LAYERS) | _defaults(model, parse(options.data)[0], options.norm)
    for name in LAYERS:
        if (value := getattr(options, name)) is not None:
            if found[name] is None:
                norm = f" with --norm {options.norm or 'batch'}" if name == "ghost_size" else ""
                raise OptionsError(
                    f"{flag(name)} is for {_WHOSE[name]}, not for --model {model}{norm}; leave it "
                    "out"
                )
            found[name] = value
    return found


def _defaults(model: str, data: str, norm: str | None) -> dict[str, Any]:
    if model == "mlp":
        return {"depth": 2, "activation": "relu"}
    if model in _WIDENING:
        return {"widening": _WIDENING[model]}
    stem = {"stem": "imagenet" if data == "imagenet" else "cifar"}
    if model.startswith(("densenet", "nfnet")):
        return stem
    if model not in _RESNETS + _CIFAR_RESNETS:
        return {}
    found = {"norm": "batch", "ghost_size": 32 if norm == "ghost" else None}
    if model in _CIFAR_RESNETS:
        return found | {"shortcut": "A"}
    return found | stem | {"shortcut": "pool"}
