"""What has to agree before a run goes on: options, data and model; and what should (versions)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from fbopt.train.config.options import Options, OptionsError, flag, implied

# Options that change where a run lies, how fast it goes or what it keeps, but not what it computes.
FREE = (
    "out", "resume", "overwrite", "data_dir", "download", "device", "threads", "save_every", "keep",
    "fingerprint_every", "chunk_norms", "cuda_graph", "track", "every",
)  # fmt: skip
_WITH_RESUME = (
    "resume", "data_dir", "download", "device", "threads", "save_every", "keep",
    "fingerprint_every", "cuda_graph",
)  # fmt: skip


def check_resume(options: Options) -> None:
    """Refuse options that a run resumed by its folder would not follow; it has its own."""
    for field in fields(Options):
        if field.name not in _WITH_RESUME and getattr(options, field.name) != field.default:
            raise OptionsError(
                f"{flag(field.name)} cannot be given with --resume RUN: the run goes on with its "
                f"own options (only {', '.join(map(flag, _WITH_RESUME[1:]))} may change); leave it "
                "out, or start a new run with --out"
            )


def given(options: Options) -> dict[str, Any]:
    """The options that a resumed run takes from the command line rather than from its own."""
    values = {name: getattr(options, name) for name in _WITH_RESUME[1:]}
    return {name: value for name, value in values.items() if value not in (None, "auto")}


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The options that differ between two runs' `as_json`: the flag and both values."""
    defaults = {field.name: field.default for field in fields(Options)} | implied(made)
    names = [name for name in dict.fromkeys([*now, *made]) if name not in FREE]
    pairs = ((n, made.get(n, defaults.get(n)), now.get(n, defaults.get(n))) for n in names)
    return [(flag(name), _word(old), _word(new)) for name, old, new in pairs if old != new]


def check_options(where: str, made: Mapping[str, Any], now: Options) -> None:
    """Refuse to go on with a run that other options made, such as another version of a recipe."""
    if found := differences(made, now.as_json()):
        text = "; ".join(f"{name} {old}, now {new}" for name, old, new in found)
        raise OptionsError(
            f"{where} was made with other options: {text}. Give the run's own, or another folder "
            "(--out)"
        )


def check_data(where: str, made: str, now: str, spec: str) -> None:
    """Refuse other samples or labels than the run began with, by their SHA-256."""
    if made != now:
        raise OptionsError(
            f"{where}: {spec} is not the data that the run began with (SHA-256 {made[:12]}…, now "
            f"{now[:12]}…); restore it, or start a new run with --out"
        )


def check_model(where: str, made: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Refuse a model whose parameters or buffers have other names, shapes or types."""
    found = []
    for name in dict.fromkeys([*made, *now]):
        old, new = (_kind(tensors.get(name)) for tensors in (made, now))
        if old != new:
            found.append(f"{name} {old}, now {new}")
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise OptionsError(
            f"{where} holds another model than these options build: {'; '.join(found[:3])}{more}. "
            "Go on with the version of fbopt that made it, or start a new run with --out"
        )


def changed(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The facts about two runs' surroundings that both know and that differ: name, old, new."""
    names = [name for name in now if name in made and made[name] != now[name]]
    return [(name, made[name], now[name]) for name in names]


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
