"""results.json and the figures, rewritten after every measure, so that Ctrl-C loses only the one in
progress.
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


class Report:
    """The results in a folder, which is created at once.

    Attributes:
        folder: where the files are.
        results: the content of results.json.
        written: the names of the files written so far.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        self.written: dict[str, None] = {}  # an ordered set
        self.results: dict[str, Any] = {
            "options": options, "environment": _environment(), "runs": {}, "measures": {},
        }  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise OptionsError(
                f"--out {folder}: cannot be written ({atomic.reason(error)}); "
                f"{atomic.cure(error)}, or give another --out"
            ) from error

    def add_run(self, subject: Subject, pass_seconds: float) -> None:
        """Add a run and the time that a pass of its training takes."""
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

    def pass_seconds(self, run: str) -> float:
        """The time that a pass of a run's training takes."""
        return self.results["runs"][run]["training_pass_seconds"]

    def add(self, measure: str, values: dict[str, Any], run: str | None = None) -> None:
        """Add what was measured of a run; without `run`, of all together."""
        measures = self.results["measures"]
        if run is None:
            measures[measure] = values
        else:
            measures.setdefault(measure, {})[run] = values
        self._write()

    def draw(self, measure: str) -> None:
        """Draw the figures that show a measure."""
        found = self.results["measures"]
        for name in (measure, *(["plane"] if measure == "flatness" and "plane" in found else [])):
            if name in figures.DRAWINGS:
                try:
                    figures.draw(name, found, self.folder / f"{name}.png")
                    self.written[f"{name}.png"] = None
                except ImportError:
                    print(f"no {name}.png: pip install matplotlib", flush=True)

    def _write(self) -> None:
        atomic.replace_json(self.folder / "results.json", self.results)
        self.written["results.json"] = None


def _environment() -> dict[str, Any]:
    return {
        "fbopt": fbopt.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
