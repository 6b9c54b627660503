"""results.json and the figures, brought up to date after every measure, so that what is finished
is kept.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import fbopt
from fbopt.train.analyze import figures
from fbopt.train.analyze.runs import Subject
from fbopt.train.checkpoint import atomic
from fbopt.train.config.options import OptionsError


class NoBar:
    """What stands for a progress bar where tqdm is not installed."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self) -> None:
        """Show nothing."""


class Report:
    """The results in a folder, which is made at once.

    Attributes:
        folder: where files go.
        results: what results.json holds.
        written: the names of the files written so far.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        self.written: list[str] = []
        self.results: dict[str, Any] = {"options": options, "environment": _environment()}
        self.results |= {"runs": {}, "measures": {}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise OptionsError(
                f"--out {folder}: cannot be written ({atomic.reason(error)}); "
                f"{atomic.cure(error)}, "
                "or give another --out"
            ) from error

    def add_run(self, subject: Subject, pass_seconds: float) -> None:
        """Note what is measured, and how long a pass of its training takes."""
        if subject.name in self.results["runs"]:
            raise OptionsError(f"{subject.name} is given twice")
        training = subject.run.options.as_json()
        self.results["runs"][subject.name] = {
            "folder": str(subject.folder),
            "step": subject.step,
            "parameters": subject.objective.size,
            "training_pass_seconds": round(pass_seconds, 6),
            "training": {k: v for k, v in training.items() if k not in ("out", "resume")},
        }
        self._write()

    def pass_seconds(self, name: str) -> float:
        """How long a pass of a run's training takes."""
        return self.results["runs"][name]["training_pass_seconds"]

    def add(self, run: str, measure: str, values: dict[str, Any]) -> None:
        """Keep what was measured of a run."""
        self.results["measures"].setdefault(measure, {})[run] = values
        self._write()

    def add_between(self, values: dict[str, Any]) -> None:
        """Keep the loss between the runs."""
        self.results["measures"]["between"] = values
        self._write()

    def draw(self, changed: str) -> None:
        """Draw the figures that show a measure, where all that they need is there."""
        found = self.results["measures"]
        drawings = {
            "sharpness": lambda: figures.sharpness(found["sharpness"]),
            "flatness": lambda: figures.flatness(found["flatness"]),
            "line": lambda: figures.line(found["line"]),
            "plane": lambda: figures.plane(found["plane"], found.get("flatness", {})),
            "between": lambda: figures.between(found["between"]),
        }
        wanted = [changed] + (["plane"] if changed == "flatness" and "plane" in found else [])
        for name in wanted:
            if name not in drawings:
                continue
            try:
                figure, note = drawings[name]()
            except ImportError:
                print(f"no {name}.png: pip install matplotlib", flush=True)
                continue
            figures.save(figure, self.folder / name, note)
            self._note(f"{name}.png", f"{name}.svg")

    def _write(self) -> None:
        atomic.replace_json(self.folder / "results.json", self.results)
        self._note("results.json")

    def _note(self, *names: str) -> None:
        self.written += [name for name in names if name not in self.written]


def _environment() -> dict[str, Any]:
    return {
        "fbopt": fbopt.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
