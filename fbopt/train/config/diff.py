"""The options in which two runs differ, and which of them may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from fbopt.train.config.options import Options, OptionsError, flag
from fbopt.train.config.resolve import resolve

# Options that do not change the numbers of a run, only its place, speed and records: first those
# that may be given with --resume RUN, then the others.
RESUMABLE = (
    "data_dir", "download", "device", "threads", "processes", "save_every", "keep",
    "fingerprint_every", "cuda_graph", "log", "timeout",
)  # fmt: skip
FREE = (*RESUMABLE, "out", "resume", "overwrite", "chunk_norms", "track", "every")


def check_resume(options: Options) -> None:
    """Refuse options beside `--resume RUN` that the run, which has its own, would ignore."""
    for field in fields(Options):
        if (
            field.name not in ("resume", *RESUMABLE)
            and getattr(options, field.name) != field.default
        ):
            raise OptionsError(
                f"{flag(field.name)} cannot be given with --resume RUN: the run goes on with its "
                f"own options (only {', '.join(map(flag, RESUMABLE))} may change); leave it "
                "out, or start a new run with --out"
            )


def given(options: Options) -> dict[str, Any]:
    """The options given beside `--resume RUN` that replace the run's own.

    Processes always: a run goes on with as many as this machine is good for.
    """
    values = {name: getattr(options, name) for name in RESUMABLE}
    replacing = {name: value for name, value in values.items() if value not in (None, "auto")}
    return replacing | {"processes": options.processes}


def resolve_for(made: Mapping[str, Any], options: Options) -> Options:
    """Resolve the options of a run that has begun: it keeps its kind of sums, how many chunks go
    through the model at once, and when the test set is looked at, unless they are given.

    The defaults were float32 and 1 before. Options that there were not are left open: None is what
    was done then.
    """
    resolved = resolve(options)
    kept = [
        name
        for name in asdict(options)
        if getattr(options, name) is None
        and (name in ("accumulation", "vectorize", "test") or name not in made)
    ]
    return replace(resolved, **{name: made.get(name) for name in kept})


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The options that differ between two runs' `as_json`: the flag and both values.

    An option that an older version did not have yet has its default there.
    """
    names = [name for name in dict.fromkeys([*now, *made]) if name not in FREE]
    old, new = ({n: o.get(n, getattr(Options, n, None)) for n in names} for o in (made, now))
    pairs = ((name, old[name], new[name]) for name in names)
    return [(flag(name), _word(a), _word(b)) for name, a, b in pairs if a != b]


def check_options(where: str, made: Mapping[str, Any], now: Options) -> None:
    """Refuse to continue a run that was made with other options, or with another recipe's."""
    if found := differences(made, now.as_json()):
        text = "; ".join(f"{name} {old}, now {new}" for name, old, new in found)
        raise OptionsError(
            f"{where} was made with other options: {text}. Give the run's own, or another folder "
            "(--out)"
        )


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
