"""The options of `fbopt plot` and their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import nearest
from fbopt.train.reporting.plots import SUFFIXES

# Entries of metrics.jsonl to draw over, by the words for them.
ENTRIES = {
    "pass": "pass", "step": "step", "seconds": "seconds", "gradients": "gradient_evaluations",
}  # fmt: skip

NAMES = [field.name for field in fields(Options)]


@dataclass(frozen=True)
class Plot:
    """Draw metrics of several runs of `fbopt train` over each other, as a figure for print.

    RUNS are run folders, finished or not. There is a panel for each metric of --y, over a shared
    axis, as wide as one column of a two-column paper (3.25 inches). Where --track sharpness has
    measured it, the threshold of stability is dashed, in the colour of its run.
    """

    runs: tuple[Path, ...]
    """Run folders."""
    x: str = "pass"
    """What to draw over: pass (over the training set), step, seconds (of training) or gradients
    (evaluations of them). Or an option of `fbopt train` with numbers, such as lr: then the last
    value that each run has logged, with a line through the means of those of one number."""
    y: str = "loss"
    """Entries of metrics.jsonl with commas between, such as loss,sharpness,test_accuracy."""
    by: str | None = None
    """Option of `fbopt train` that gives a run its colour, such as lr: runs with the same value
    share one. Default: every run has its own, and over an option all have the same."""
    log: str = ""
    """Those of --y, and of --x, whose axis is logarithmic, with commas between."""
    out: Path = Path("plot.png")
    """File to write, .png (200 dots per inch) or .pdf."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The entries that `y` names."""
        return names_in(self.y)

    @property
    def option(self) -> str | None:
        """The field of Options that `by` names."""
        return self.by and _field(self.by)

    @property
    def over(self) -> str | None:
        """The field of Options that `x` names; None if it names an entry of metrics.jsonl."""
        return None if self.x in ENTRIES else _field(self.x)


def _field(words: str) -> str:
    return words.lstrip("-").replace("-", "_")


def names_in(words: str) -> tuple[str, ...]:
    """The names in a list with commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))


def check(options: Plot) -> None:
    """Raise OptionsError for an invalid option, before anything is read."""
    if not options.runs:
        raise OptionsError("give the folders of one or more runs, such as runs/digits-fb-s0")
    resolved: set[Path] = set()
    for path in options.runs:
        if (place := path.resolve()) in resolved:
            raise OptionsError(f"{path} is given twice; leave one out")
        resolved.add(place)
    if not options.metrics:
        raise OptionsError("--y is empty; name entries of metrics.jsonl, as in --y loss,sharpness")
    for name in names_in(options.log):
        if name not in (*options.metrics, options.x):
            known = ", ".join((*options.metrics, options.x))
            raise OptionsError(f"--log {name}: is on no axis of this figure; choose of {known}")
    for flag, words, name in (
        ("--by", options.by, options.option), ("--x", options.x, options.over)
    ):  # fmt: skip
        if name is not None and name not in NAMES:
            near = nearest(name, NAMES) or "; `fbopt train --help` lists them"
            entry = f"neither {', '.join(ENTRIES)} nor an" if flag == "--x" else "no"
            raise OptionsError(f"{flag} {words}: is {entry} option of `fbopt train`{near}")
    if options.out.suffix.lower() not in SUFFIXES:
        raise OptionsError(f"--out {options.out}: has to end in {' or '.join(SUFFIXES)}")
    if options.out.is_dir():
        raise OptionsError(f"--out {options.out}: is a folder; give a file")
