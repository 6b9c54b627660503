"""The run folder and its lock: options, metrics, checkpoints, fingerprints, result.

runs/mnist1d-fb-penalty-s0/{options.json, metrics.jsonl, environment.jsonl, fingerprints.jsonl,
checkpoint-STEP.pt, curves.png, result.json}, and events.out.tfevents.* of TensorBoard
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fbopt.train.checkpoint import atomic, format
from fbopt.train.checkpoint.format import CheckpointError
from fbopt.train.checkpoint.schema import fault_of_metrics, fault_of_result
from fbopt.train.config.diff import differences
from fbopt.train.config.options import OptionsError
from fbopt.train.config.reading import open_regular, read_bytes, reading

FILES = (
    "options.json", "metrics.jsonl", "environment.jsonl", "fingerprints.jsonl", "curves.png",
    "result.json",
)  # fmt: skip
PARTIAL = ".checkpoint.pt" + atomic.PARTIAL  # one name for all steps, so a crash leaves one file
_CHECKPOINT = re.compile(r"checkpoint-(\d+)\.pt(\.unsound)?")
EVENTS = "events.out.tfevents."
LOCK = ".lock"
LOCK_SECONDS = 1.0  # how long to wait for it: a killed process may be about to disappear


class RunFolder:
    """The folder of one run; its files are attributes, each a path."""

    def __init__(self, path: Path) -> None:
        self.path = path = Path(path)  # also where Python code gives a string
        self._lock = FileLock(path / LOCK)
        (self.options, self.metrics, self.environment, self.fingerprints, self.curves,
         self.result) = (path / name for name in FILES)  # fmt: skip

    def __reduce__(self) -> tuple[type[RunFolder], tuple[Path]]:
        return RunFolder, (self.path,)  # rank 0 alone has the lock

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        return f"fbopt train --resume {shlex.quote(str(self.path))}"

    def path_of(self, step: int) -> Path:
        """The file of the checkpoint of a step."""
        return self.path / f"checkpoint-{step}.pt"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The steps and files of all checkpoints, sound or not, the newest first."""
        matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in self._entries())
        found = [(int(m[1]), path) for m, path in matches if m and m[2] is None]
        return sorted(found, reverse=True)

    def _entries(self) -> list[Path]:
        """What is in the folder; nothing if there is none. Raises OptionsError."""
        with reading(f"{self.path}", OptionsError, "allow yourself to list it, or give another"):
            return list(self.path.iterdir()) if self.path.is_dir() else []

    def event_files(self) -> list[Path]:
        """The files that TensorBoard reads."""
        return sorted(self.path.glob(EVENTS + "*"))

    def check_free(self, overwrite: bool) -> None:
        """Raise OptionsError where a new run here would replace a run or mix with other files."""
        if self.path.exists() and not self.path.is_dir():
            raise OptionsError(f"--out {self.path}: is a file; give another --out")
        if overwrite or not self.path.exists():
            return
        if self.result.exists():
            raise OptionsError(
                f"{self.path} holds a finished run ({accuracies(self.read_result())}); "
                "give another --out, or --overwrite to replace it"
            )
        if self.checkpoints():
            raise OptionsError(
                f"{self.path} holds an interrupted run; go on with "
                f"`{self.resume_command}`, or --overwrite to replace it"
            )
        if stray := [path.name for path in self._entries() if not _of_a_run(path)]:
            raise OptionsError(
                f"--out {self.path}: holds {stray[0]}, which is not a run's; give another --out"
            )

    def lock(self, stack: contextlib.ExitStack) -> None:
        """Lock the folder until `stack` closes; raise OptionsError where another process has it."""
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise OptionsError(
                f"{self.path} is in use: another process is training into it; wait for it or "
                "stop it, or give another --out"
            ) from error
        # The file stays: one that is removed could be locked twice.
        stack.callback(self._lock.release)

    def lock_existing(self, stack: contextlib.ExitStack) -> None:
        """Lock the folder if it holds a run.

        Raises OptionsError where something else than a file has the name of one of a run's.
        """
        for path in self._entries():
            own = path.name == LOCK or (path.name[0] != "." and _of_a_run(path))
            if own and not path.is_file():
                raise OptionsError(
                    f"{path} is no regular file, as all files of a run are; remove it"
                )
        if self.options.exists():
            with self.writing(self.path):
                self.lock(stack)

    def create(self, options: dict[str, Any], overwrite: bool, stack: contextlib.ExitStack) -> None:
        """Make and lock the folder, remove an earlier run's files (only those), write the options.

        Raises OptionsError where a run cannot begin here.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock(stack)
            self.check_free(overwrite)  # again, now that no other can change it
            for path in self.path.iterdir():
                if _of_a_run(path) and path.name[0] != ".":
                    path.unlink()
            atomic.replace_json(self.options, options)
        except OSError as error:
            raise OptionsError(
                f"--out {self.path}: cannot be written ({error.strerror or error}); "
                f"{atomic.cure(error)}, or give another --out"
            ) from error

    def save(self, state: dict[str, Any], keep: int) -> None:
        """Write the checkpoint of `state["step"]`, then remove all but the newest `keep`."""
        path = self.path_of(state["step"])
        with self.writing(path):
            atomic.replace(path, format.seal(state), PARTIAL)
            for _, older in self.checkpoints()[keep:]:
                older.unlink(missing_ok=True)

    def load(self) -> dict[str, Any]:
        """The newest sound checkpoint, on the CPU; newer damaged ones are named on stderr.

        Raises OptionsError where there is none.
        """
        found = self.checkpoints()
        if not found:
            raise OptionsError(
                f"--resume {self.path}: there is no checkpoint in it; give the folder of an "
                "interrupted run, or start one without --resume"
            )
        for step, path in found:
            try:
                return self.read_checkpoint(step)
            except CheckpointError as error:
                print(f"warning: {path} is passed over: {error}", file=sys.stderr, flush=True)
        raise OptionsError(
            f"--resume {self.path}: none of its checkpoints is sound "
            f"({', '.join(path.name for _, path in found)}); put a sound copy back, or start "
            "again with --overwrite instead of --resume"
        )

    def read_checkpoint(self, step: int) -> dict[str, Any]:
        """The checkpoint of a step. Raises CheckpointError where there is no sound one."""
        state = format.read(self.path_of(step))
        if state["step"] != step:
            raise CheckpointError(f"it holds step {state['step']}: it was renamed")
        made = self.read_options()
        if made is not None and (found := differences(made, state["options"])):
            name, own, other = found[0]
            raise CheckpointError(f"it belongs to another run ({name} {other}, not {own})")
        return state

    def read_options(self) -> dict[str, Any] | None:
        """The content of options.json; None where it cannot be read."""
        try:
            options = json.loads(read_bytes(self.options))
        except (OSError, ValueError, RecursionError):
            return None
        return options if isinstance(options, dict) else None

    def forget_after(self, step: int) -> None:
        """Remove records made after `step`, which a resumed run writes again."""
        with self.writing(self.path):
            self.result.unlink(missing_ok=True)
            for later, path in self.checkpoints():
                if later > step:  # damaged; `keep` would count it and drop sound ones
                    path.rename(f"{path}.unsound")
            for path, last in (
                (self.metrics, step), (self.fingerprints, step), (self.environment, step - 1)
            ):  # fmt: skip
                kept = [record for record in atomic.read_lines(path) if record["step"] <= last]
                atomic.replace_lines(path, kept)

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """Add one line to metrics, fingerprints or environment."""
        with self.writing(path), open_regular(path, append=True) as file:
            file.write(f"{json.dumps(record)}\n".encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of all passes that were logged; what is no such record is left out."""
        return [r for r in atomic.read_lines(self.metrics) if fault_of_metrics(r) is None]

    def read_result(self) -> dict[str, Any]:
        """The summary of a finished run. Raises OptionsError where it cannot be read."""
        cure = "put it back, or remove it and train the last step again with --resume"
        with reading(f"{self.result}", OptionsError, cure):
            result = json.loads(read_bytes(self.result))
            if wrong := fault_of_result(result):
                raise ValueError(wrong)
            return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished."""
        with self.writing(self.result):
            atomic.replace_json(self.result, result)

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Turn an OSError into a WriteError that says how to go on from the last checkpoint."""
        try:
            yield
        except OSError as error:
            kept = self.checkpoints()
            then = "then start again: nothing was saved before, and all steps are lost"
            if kept:
                then = f"then go on from step {kept[0][0]} with\n  {self.resume_command}"
            raise atomic.WriteError(
                f"{path} cannot be written ({error.strerror or error}): {atomic.cure(error)}, "
                f"{then}"
            ) from error


def accuracies(result: dict[str, Any], losses: bool = False) -> str:
    """What a finished run has on the splits that it was evaluated on, in words."""
    words = []
    for name in ("validation", "test"):
        if (share := result.get(f"{name}_accuracy")) is not None:
            loss = f" (loss {result[f'{name}_loss']:.4f})" if losses else ""
            words.append(f"{name} accuracy {share:.2%}{loss}")
    return ", ".join(words)


def _of_a_run(path: Path) -> bool:
    """Whether a file is one that a run writes, or a hidden one."""
    name = path.name
    if name in FILES or name[0] == "." or name.startswith(EVENTS):
        return True
    return _CHECKPOINT.fullmatch(name) is not None
