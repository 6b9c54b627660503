"""The options in which two runs differ, and which of them may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

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


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
