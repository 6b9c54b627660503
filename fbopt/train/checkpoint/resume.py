"""Where a run begins: afresh, or from the newest sound checkpoint of its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fbopt.train.checkpoint.provenance import WHY, changed
from fbopt.train.checkpoint.run_dir import Lock, RunFolder
from fbopt.train.config import diff
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.trainer import Run

Hold = Callable[[RunFolder], None]


class Start(NamedTuple):
    """The resolved options, the run's folder, and the checkpoint's content (None: afresh)."""

    options: Options
    folder: RunFolder
    state: dict[str, Any] | None


def find_start(options: Options, lock: Lock | None = None) -> Start:
    """What `options` ask to begin with; `lock` then holds the folder of a run that is there.

    Raises OptionsError; nothing is changed.
    """
    hold: Hold = (lambda folder: None) if lock is None else lock.hold_existing
    if options.resume is None:
        options = resolve(options)
        folder = RunFolder(options.folder)
        hold(folder)
        folder.check_free(options.overwrite)
        return Start(options, folder, None)
    if options.resume == "auto":
        return _automatic(resolve(options), hold)
    return _continued(options, options.resume, hold)


def _automatic(options: Options, hold: Hold) -> Start:
    """The run that these options make, from its newest sound checkpoint if there is any."""
    folder = RunFolder(options.folder)
    hold(folder)
    if not folder.checkpoints():
        folder.check_free(overwrite=False)
        print(f"--resume auto: no checkpoint in {folder.path}/, so from the beginning", flush=True)
        return Start(options, folder, None)
    state = folder.load()
    diff.check_options(f"the run in {folder.path}", state["options"], options)
    return Start(options, folder, state)


def _continued(options: Options, path: Path, hold: Hold) -> Start:
    """The run in a folder, with its own options."""
    diff.check_resume(options)
    folder = RunFolder(path)
    hold(folder)
    state = folder.load()
    try:
        saved = Options.from_json(state["options"])
    except TypeError as error:
        versions = state["environment"]
        raise OptionsError(
            f"--resume {path}: the run was made by fbopt {versions['fbopt']}, which has other "
            f"options ({error}); go on with that version, or start a new run with --out"
        ) from error
    if folder.result.exists():
        raise OptionsError(f"--resume {path}: the run is finished; start a new one with --out")
    own = {"out": path, "resume": path, **diff.given(options)}
    return Start(replace(saved, **own), folder, state)


def restore(run: Run, start: Start, facts: dict[str, Any]) -> None:
    """Bring a run to where its checkpoint was written. Raises OptionsError for what differs."""
    where, state = f"--resume {start.folder.path}", start.state
    check_data(where, state["data"], facts["data"], start.options.data)
    check_model(where, state["model"], run.model.state_dict())
    run.load_state_dict(state)
    for name, old, new in changed(state["environment"], facts):
        print(f"note: {name} {old} before, {new} now: {WHY.get(name, 'bits may differ')}")


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


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
