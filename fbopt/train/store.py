"""The run folder: options, metrics, checkpoint and result; a crash while writing spoils none.

runs/mnist1d-fb-penalty-s0/{options.json, metrics.jsonl, checkpoint.pt, curves.png, result.json}
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fbopt.train.options import OptionsError

FILES = ("options.json", "metrics.jsonl", "checkpoint.pt", "curves.png", "result.json")


class RunFolder:
    """A folder with the files of one run, each a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.options, self.metrics, self.checkpoint, self.curves, self.result = (
            path / name for name in FILES
        )

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        return f"fbopt train --resume {shlex.quote(str(self.path))}"

    def check_free(self, overwrite: bool) -> None:
        """Raise OptionsError where a new run here would cost something that is worth keeping."""
        if self.path.exists() and not self.path.is_dir():
            raise OptionsError(f"--out {self.path}: is a file; give another --out")
        if overwrite or not self.path.exists():
            return
        if self.result.exists():
            accuracy = self.read_result()["test_accuracy"]
            raise OptionsError(
                f"{self.path} holds a finished run (test accuracy {accuracy:.2%}); "
                "give another --out, or --overwrite to replace it"
            )
        if self.checkpoint.exists():
            raise OptionsError(
                f"{self.path} holds an interrupted run; go on with "
                f"`{self.resume_command}`, or --overwrite to replace it"
            )
        if stray := [
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in FILES and entry.name[0] != "."
        ]:
            raise OptionsError(
                f"--out {self.path}: holds {stray[0]}, which is not a run's; give another --out"
            )

    def create(self, options: dict[str, Any]) -> None:
        """Make the folder, remove what an earlier run left (its own files only), write options."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
            self._write_json(self.options, options)
        except OSError as error:
            raise OptionsError(f"--out {self.path}: cannot be written ({error})") from error

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a crash cut short is left out."""
        if not self.metrics.exists():
            return []
        text = self.metrics.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will take again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        _replace(self.metrics, lambda file: file.write(text.encode()))

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint: tensors and plain types only, so that it loads as weights only."""
        _replace(self.checkpoint, lambda file: torch.save(state, file))

    def load(self) -> dict[str, Any]:
        """The checkpoint, on the CPU. Raises OptionsError where there is none to go on from."""
        if not self.checkpoint.is_file():
            raise OptionsError(
                f"--resume {self.path}: there is no checkpoint.pt in it; give the "
                "folder of an interrupted run, or start one without --resume"
            )
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise OptionsError(
                f"--resume {self.path}: checkpoint.pt cannot be read ({error}); "
                "start again with --overwrite"
            ) from error

    def read_result(self) -> dict[str, Any]:
        """The summary of a finished run."""
        return json.loads(self.result.read_text(encoding="utf-8"))

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished."""
        self._write_json(self.result, result)

    @staticmethod
    def _write_json(path: Path, values: dict[str, Any]) -> None:
        text = json.dumps(values, indent=2) + "\n"
        _replace(path, lambda file: file.write(text.encode()))


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside `path`, then rename it over `path` at once."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
