"""The hyperparameters that were chosen for every row: the file that examples/tune.py writes.

    {"chosen_by": "validation_accuracy",
     "rows": {ROW: {"options": {"lr": 0.2, …}, "common": {…}, "trials": […]}, …}}

`common` are the options of all trials of a row. What was chosen with a look at the test set is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fbopt.train.config.options import Options, OptionsError, flag

CHOSEN_BY = "validation_accuracy"
TUNE = "tune the rows again with examples/tune.py"


def read(path: Path, rows: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The chosen options of each of `rows`, by row. Raises OptionsError."""
    where = f"--tuned {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        by, found = content["chosen_by"], content["rows"]
        known = [row for row in rows if found.get(row)]
        parts = {row: (found[row]["options"], found[row]["common"]) for row in known}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionsError(f"{where}: cannot be read ({error!r}); {TUNE}") from error
    if by != CHOSEN_BY:
        raise OptionsError(
            f"{where}: its rows were chosen by {by}, and only {CHOSEN_BY}, on held-out training "
            f"samples, leaves the test set for the table; {TUNE}"
        )
    for row in rows:
        if row not in parts:
            raise OptionsError(f"{where}: has no {row}; tune it, too, or leave it out of --rows")
        common = parts[row][1]
        if common.get("test") != "never" or not common.get("validation"):
            raise OptionsError(
                f"{where}: the trials of {row} looked at the test set; {TUNE}, with --validation "
                "and --test never"
            )
    return {row: chosen for row, (chosen, _) in parts.items()}


def apply(options: Options, chosen: dict[str, Any], path: Path) -> Options:
    """The options with those that were chosen. Raises OptionsError where both say something."""
    for name in chosen:
        if not hasattr(options, name):
            raise OptionsError(f"--tuned {path}: {name} is no option; {TUNE}")
        if getattr(options, name) != getattr(Options, name):
            raise OptionsError(f"{flag(name)}: --tuned {path} has chosen it; leave one of them out")
    return replace(options, **chosen)
