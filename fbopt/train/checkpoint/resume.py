"""Where a run begins: from scratch, or from the newest sound checkpoint of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fbopt.train.checkpoint.provenance import WHY, changed
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.checkpoint.schema import fault_of_parts
from fbopt.train.config import diff
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.reading import options_of, reading
from fbopt.train.config.resolve import check_paths, resolve
from fbopt.train.trainer import Trainer


class Start(NamedTuple):
    """The resolved options, the run's folder, and its checkpoint's content (None: from scratch)."""

    options: Options
    folder: RunFolder
    state: dict[str, Any] | None


def find_start(options: Options, lock: ExitStack) -> Start:
    """The start that `options` ask for; the folder of a run that exists is locked until
    `lock` closes.

    Raises OptionsError; nothing is changed.
    """
    check_paths(options)
    if options.resume is None:
        options = resolve(options)
        folder = RunFolder(options.folder)
        folder.lock_existing(lock)
        folder.check_free(options.overwrite)
        return Start(options, folder, None)
    if options.resume == "auto":
        return _resume_auto(options, lock)
    return _resume_folder(options, options.resume, lock)


def _resume_auto(options: Options, lock: ExitStack) -> Start:
    """The run that these options make, from its newest sound checkpoint if there is any."""
    resolved = resolve(options)
    folder = RunFolder(resolved.folder)
    folder.lock_existing(lock)
    if not folder.checkpoints():
        folder.check_free(overwrite=False)
        print(f"--resume auto: no checkpoint in {folder.path}/, so from the beginning", flush=True)
        return Start(resolved, folder, None)
    state = folder.load()
    resolved = diff.resolve_for(state["options"], options)
    diff.check_options(f"the run in {folder.path}", state["options"], resolved)
    return Start(resolved, folder, state)


def _resume_folder(options: Options, path: Path, lock: ExitStack) -> Start:
    """The run in a folder, with its own options."""
    diff.check_resume(options)
    folder = RunFolder(path)
    folder.lock_existing(lock)
    state = folder.load()
    saved = made_with(f"--resume {path}", state)
    if folder.result.exists():
        raise OptionsError(f"--resume {path}: the run is finished; start a new one with --out")
    own = {"out": path, "resume": path, **diff.given(options)}
    return Start(replace(saved, **own), folder, state)


def restore(trainer: Trainer, start: Start, environment: dict[str, Any]) -> None:
    """Load a checkpoint into a trainer. Raises OptionsError for other data or another model."""
    where, state = f"--resume {start.folder.path}", start.state
    check_data(where, state["data"], environment["data"], start.options.data)
    check_model(where, state["model"], trainer.model.state_dict())
    load(where, trainer, state)
    for name, old, new in changed(state["environment"], environment):
        print(f"note: {name} {old} before, {new} now: {WHY.get(name, 'bits may differ')}")


def load(where: str, trainer: Trainer, state: dict[str, Any]) -> None:
    """Load a checkpoint whose model fits. Raises OptionsError, before anything is changed where it
    can be told, for parts that are none of this trainer.
    """
    cure = "the checkpoint is altered: remove it to go on from the one before"
    with reading(where, OptionsError, cure):
        passes, _ = trainer.position_after(state["step"])
        if wrong := fault_of_parts(state, trainer.state_dict(), passes):
            raise ValueError(wrong)
        trainer.load_state_dict(state)


def made_with(where: str, state: Mapping[str, Any]) -> Options:
    """The options of the run in a checkpoint. Raises OptionsError where there are others."""
    try:
        return options_of(state["options"], where)
    except TypeError as error:
        version = state["environment"].get("fbopt", "another version")
        raise OptionsError(
            f"{where}: the run was made by fbopt {version}, which has other options ({error}); use "
            "that version, or start a new run with --out"
        ) from error


def check_data(where: str, made: str, now: str, spec: str) -> None:
    """Refuse samples or labels that differ, by SHA-256, from those the run began with."""
    if made != now:
        raise OptionsError(
            f"{where}: {spec} is not the data that the run began with (SHA-256 {made[:12]}…, now "
            f"{now[:12]}…); restore it, or start a new run with --out"
        )


def check_model(where: str, made: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Refuse a model whose parameters or buffers have other names, shapes or dtypes."""
    old, new = (
        {n: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for n, t in model.items()}
        for model in (made, now)
    )
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    found = [f"{n} {old.get(n, 'absent')}, now {new.get(n, 'absent')}" for n in names]
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise OptionsError(
            f"{where} holds another model than these options build: {'; '.join(found[:3])}{more}. "
            "Go on with the version of fbopt that made it, or start a new run with --out"
        )
