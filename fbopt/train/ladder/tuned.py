"""The hyperparameters that were chosen for every row: the file that examples/tune.py writes.

    {"chosen_by": "validation_accuracy",
     "rows": {ROW: {"options": {"lr": 0.2, …}, "common": {…}, "passes": 100, "trials": […]}, …}}

`common` are the options of all trials of a row. What was chosen with a look at the test set is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fbopt.train.config.dataspec import parse
from fbopt.train.config.options import Options, OptionsError, flag
from fbopt.train.config.reading import read_bytes, reading

CHOSEN_BY = "validation_accuracy"
TUNE = "tune the rows again with examples/tune.py"
TUNABLE = (
    "lr", "weight_decay", "max_norm", "penalty", "full_penalty", "radius", "rho", "sam_share",
    "chunk_max_norm", "agc", "momentum", "label_smoothing", "batch_size", "chunk_size",
)  # fmt: skip
# What a trial and a run differ in by design: their lengths, folders, and what they record.
FREE = (
    "recipe", "seed", "epochs", "steps", "eval_every", "log_every", "save_every", "keep", "test",
    "out", "resume", "threads", "processes", "chunk_norms", "data_dir", "device", "data",
)  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """What was chosen for a row.

    Attributes:
        path: the file.
        options: the chosen ones, by name.
        common: those of all trials that are not the program's defaults.
        passes: epochs or steps of a trial.
        trials: how many there were.
        accuracy: the best one's, on the held-out samples.
    """

    path: Path
    options: dict[str, Any]
    common: dict[str, Any]
    passes: int
    trials: int
    accuracy: float

    def apply(self, options: Options, seeds: Iterable[int]) -> Options:
        """The options of a row with those that were chosen; `seeds` are the runs'.

        Raises OptionsError: another data set or other held-out samples than the trials', a seed of
        theirs, and an option that both name.
        """
        where = f"--tuned {self.path}"
        for name in self.options:
            if name not in TUNABLE:
                raise OptionsError(f"{where}: {name} is none of {', '.join(TUNABLE)}; {TUNE}")
            if getattr(options, name) != getattr(Options, name):
                raise OptionsError(f"{flag(name)}: {where} has chosen it; leave one of them out")
        (mine, here), (theirs, there) = (parse(d) for d in (options.data, self._common("data")))
        if (mine, here and here.name) != (theirs, there and there.name):
            raise OptionsError(
                f"{where}: was chosen on --data {self._common('data')}; {TUNE} on {options.data}"
            )
        if options.validation != self._common("validation"):
            raise OptionsError(
                f"{where}: was chosen on --validation {self._common('validation')}, and these "
                "samples stay out of training; give the same here"
            )
        if (seed := self._common("seed")) in seeds:
            raise OptionsError(
                f"{where}: its trials had seed {seed}, which was then chosen for; give "
                f"--first-seed {seed + 1}"
            )
        return replace(options, **self.options)

    def differences(self, options: Options) -> list[str]:
        """How a run differs from the trials otherwise, in words."""
        names = (name for name in options.as_json() if name not in (*FREE, *self.options))
        pairs = [(name, self._common(name), getattr(options, name)) for name in names]
        return [f"{flag(n)} {there}, here {here}" for n, there, here in pairs if there != here]

    def _common(self, name: str) -> Any:
        return self.common.get(name, getattr(Options, name))

    def as_json(self, options: Options) -> dict[str, Any]:
        """What a ladder's table was made with."""
        facts = {"options": self.options, "passes": self.passes, "trials": self.trials}
        facts |= {"validation_accuracy": self.accuracy, "common": self.common}
        return facts | {"differences": self.differences(options)}


def read(path: Path, rows: Iterable[str]) -> dict[str, Tuned]:
    """What was chosen for each of `rows`. Raises OptionsError."""
    where = f"--tuned {path}"
    with reading(f"{where}: cannot be read", OptionsError, TUNE):
        content = json.loads(read_bytes(path))
        by, found = content["chosen_by"], content["rows"]
        tuned = {row: _tuned(path, found[row]) for row in rows if found.get(row)}
    if by != CHOSEN_BY:
        raise OptionsError(
            f"{where}: its rows were chosen by {by}, and only {CHOSEN_BY}, on held-out training "
            f"samples, leaves the test set for the table; {TUNE}"
        )
    for row in rows:
        if row not in tuned:
            raise OptionsError(f"{where}: has no {row}; tune it, too, or leave it out of --rows")
        if tuned[row].common.get("test") != "never":
            raise OptionsError(f"{where}: the trials of {row} looked at the test set; {TUNE}")
        if not tuned[row].common.get("validation"):
            raise OptionsError(f"{where}: no samples were held out for {row}; {TUNE}")
    return tuned


def _tuned(path: Path, row: dict[str, Any]) -> Tuned:
    return Tuned(
        path,
        dict(row["options"]),
        dict(row["common"]),
        int(row["passes"]),
        len(row["trials"]),
        float(row["validation_accuracy"]),
    )
