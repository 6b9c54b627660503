"""results.json and the figures, rewritten after every measure, so that Ctrl-C loses only the one in
progress.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fbopt.train.analyze import figures
from fbopt.train.analyze.measures import Values, count_passes
from fbopt.train.analyze.options import Analysis, as_json
from fbopt.train.analyze.runs import Subject
from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.provenance import environment
from fbopt.train.config.options import OptionsError
from fbopt.train.reporting import progress

FACTS = ("fbopt", "torch", "python", "processor", "threads")  # of the environment


class Report:
    """The results in a folder, which is created at once.

    Attributes:
        results: the content of results.json.
        written: the names of the files written so far.
    """

    def __init__(self, folder: Path, options: Analysis, subjects: list[Subject]) -> None:
        self.folder, self.options = folder, options
        self.written: dict[str, None] = {}  # an ordered set
        facts = environment(subjects[0].run, subjects[0].state["data"])
        self.results: dict[str, Any] = {
            "options": as_json(options), "environment": {name: facts[name] for name in FACTS},
            "runs": {}, "measures": {},
        }  # fmt: skip
        self._write()
        for subject in subjects:
            self._add_run(subject)

    def _add_run(self, subject: Subject) -> None:
        """Add a run and the time that a pass of its training takes."""
        if subject.name in self.results["runs"]:
            raise OptionsError(f"{subject.name} is given twice")
        training = subject.run.options.as_json()
        self.results["runs"][subject.name] = {
            "folder": str(subject.folder),
            "step": subject.state["step"],
            "parameters": subject.objective.size,
            "training_pass_seconds": round(subject.pass_seconds(self.options.train_steps), 6),
            "training": {k: v for k, v in training.items() if k not in ("out", "resume")},
        }
        self._write()

    def measure(
        self, name: str, subject: Subject, work: Callable[[], tuple[Values, str]], alone: bool
    ) -> None:
        """Do the work, a measure of one run alone or of all, print and add what it found."""
        title = f"{subject.name}: {name}" if alone else "between the runs"
        subject.set_precision()
        before, start = subject.objective.cost.copy(), time.perf_counter()
        with self._showing_progress(title, name, subject):
            values, text = work()
        seconds = time.perf_counter() - start
        pass_seconds = self.results["runs"][subject.name]["training_pass_seconds"]
        passes = round(seconds / pass_seconds, 2)
        cost = vars(subject.objective.cost.since(before))
        print(
            f"{title}: {text}\n    {cost['gradients']} gradients, {cost['second_backwards']} "
            f"second backward passes, {cost['losses']} losses; {seconds:.1f} s, as long as "
            f"{passes:.1f} passes of training",
            flush=True,
        )
        values |= {"cost": cost | {"seconds": round(seconds, 3), "training_passes": passes}}
        found = self.results["measures"]
        found[name] = found.get(name, {}) | {subject.name: values} if alone else values
        self._write()

    @contextlib.contextmanager
    def _showing_progress(self, title: str, name: str, subject: Subject) -> Iterator[None]:
        """Show a bar that counts the objective's passes, on a terminal."""
        objective, total = subject.objective, count_passes(name, subject, self.options)
        bar = progress.bar(total=total, desc=title, unit="pass", leave=False, disable=None)
        try:
            objective.on_pass = bar.update
            yield
        finally:
            objective.on_pass = lambda: None
            bar.close()

    def draw(self, measure: str) -> None:
        """Draw the figures that show a measure."""
        found = self.results["measures"]
        for name in (measure, *(["plane"] if measure == "flatness" and "plane" in found else [])):
            if name in figures.DRAWINGS:
                try:
                    with self._writing():
                        figures.draw(name, found, self.folder / f"{name}.png")
                    self.written[f"{name}.png"] = None
                except ImportError:
                    print(f"no {name}.png: pip install matplotlib", flush=True)

    def _write(self) -> None:
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.replace_json(self.folder / "results.json", self.results)
        self.written["results.json"] = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OptionsError(
                f"--out {self.folder}: cannot be written ({error.strerror or error}); "
                f"{atomic.cure(error)}, or give another --out"
            ) from error
