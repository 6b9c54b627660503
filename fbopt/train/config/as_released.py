"""Where the authors' released code differs from the paper, or from what one would expect.

`--as-released` follows all that have an effect; each is an option of its own, too. In resolved
options it is that option which says so, None where the default holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fbopt.train.config.options import Options, OptionsError, flag

RESIDUAL = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class Switch(NamedTuple):
    """A difference: the default's value, the release's, and what it needs to have an effect."""

    default: str
    released: str
    needs: str


SWITCHES = {
    "mean": Switch("samples", "running", "chunks, which sgd has none of"),
    "last_chunk": Switch("keep", "drop", ""),
    "residual_init": Switch("zero", "one", f"a residual network; choose --model {RESIDUAL[0]}"),
    "first_rate": Switch("positive", "zero", "a warm-up; add --warmup 10"),
    "batchnorm": Switch(
        "mean",
        "every-pass",
        "BatchNorm (not ghost) and several chunks or passes; choose --model resnet18",
    ),
    "central_radius": Switch("full", "half", "central differences; add --method central"),
    "smoothing": Switch("all", "others", "label smoothing; add --label-smoothing 0.1"),
}
# What would run a model's Python only once, or in another place.
OUT_OF_SIGHT = {
    "cuda_graph": "a captured graph", "compile": "a compiled pass", "vectorize": "chunks at once",
}  # fmt: skip


def resolve_switches(given: Options, values: dict[str, Any]) -> dict[str, Any]:
    """Return the switches, `as_released` dissolved into them; `values` holds all other options."""
    has_effect = _effects(given, values)
    found: dict[str, Any] = {"as_released": False}
    for name, switch in SWITCHES.items():
        value = getattr(given, name)
        if value == switch.released and not has_effect[name]:
            raise OptionsError(f"{flag(name)} {value} has no effect without {switch.needs}")
        wanted = value == switch.released or (value is None and given.as_released)
        found[name] = switch.released if wanted and has_effect[name] else None
    if found["batchnorm"]:
        found |= _in_sight(given)
    return found


def _effects(given: Options, values: dict[str, Any]) -> dict[str, bool]:
    """Whether each switch changes anything."""
    differs = values["penalty"] is not None and values["method"] == "central"
    normalised = values["norm"] in (None, "batch") and values["model"] not in ("cnn", "nfnet-f0")
    searched = values["line_search"] is not None
    shifted = values["method"] in ("forward", "central")
    return {
        "mean": not given.stochastic and not searched,
        "last_chunk": True,
        "residual_init": values["model"] in RESIDUAL and values["norm"] != "skipinit",
        "first_rate": values["warmup"] > 0,
        "batchnorm": normalised and not searched and (shifted or not given.stochastic),
        "central_radius": differs,
        "smoothing": values["label_smoothing"] > 0,
    }


def _in_sight(given: Options) -> dict[str, Any]:
    """What the passes have to be like for their statistics to be seen one by one."""
    for name, words in OUT_OF_SIGHT.items():
        value = getattr(given, name)
        if value is True or value not in (None, False, 1):
            raise OptionsError(
                f"{flag(name)}: --batchnorm every-pass does not see into {words}; leave it out"
            )
    if given.processes not in ("auto", 1):
        raise OptionsError(
            f"--processes {given.processes}: --batchnorm every-pass follows the passes of one "
            "process; leave it out"
        )
    return {"cuda_graph": False, "vectorize": None}
