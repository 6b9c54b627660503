"""One change at a time: rows of several ladders beside the same row of another, seed by seed.

    python -m benchmarks.changes BASE/ladder.json CHANGED/ladder.json …

prints, for every row that a changed ladder shares with BASE, the options in which the two differ,
and the paired difference in test accuracy with its 95 % interval by Student's t. Where the number
of steps or epochs differs, the schedule that follows from it is not listed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fbopt.train.config.diff import differences
from fbopt.train.ladder.paired import difference
from fbopt.train.ladder.summary import difference_words, spread, words

HEAD = """\
| row | changed | test accuracy (%) | minus unchanged (95 % interval) | n | train loss \
| train accuracy (%) |
|---|---|---|---|---:|---|---|"""
LENGTHS, FOLLOWING = {"--steps", "--epochs"}, {"--warmup", "--cosine"}


def main(paths: Sequence[str] | None = None) -> None:
    """Print the table."""
    given = list(paths or sys.argv[1:])
    if len(given) < 2:
        raise SystemExit("usage: python -m benchmarks.changes BASE/ladder.json CHANGED/ladder.json")
    base, *others = (_rows(Path(path)) for path in given)
    for path, other in zip(given[1:], others, strict=True):
        if not base.keys() & other.keys():
            raise SystemExit(f"{path}: has none of the rows {', '.join(base)} of {given[0]}")
    print(HEAD)
    for name, row in base.items():
        print(_line(row, "–", None))
        for other in others:
            if name in other:
                print(_line(other[name], _changes(row, other[name]), row))


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{path}: not the ladder.json of a ladder ({error!r})") from error
    return {row["row"]: row for row in rows}


def _changes(base: dict[str, Any], row: dict[str, Any]) -> str:
    """The options that differ, as they are given."""
    found = {name: new for name, _, new in differences(base["options"], row["options"])}
    left_out = FOLLOWING if LENGTHS & found.keys() else set()
    return ", ".join(f"`{name} {new}`" for name, new in found.items() if name not in left_out)


def _line(row: dict[str, Any], changed: str, base: dict[str, Any] | None) -> str:
    runs = row["runs"]
    found = base and difference(runs, base["runs"], "test_accuracy")
    cells = [
        f"`{row['row']}`",
        changed,
        words(row["test_accuracy"], 2, 100),
        difference_words(found, len(runs)),
        str(len(runs)),
        words(row["loss"], 4),
        words(spread([run["train_accuracy"] for run in runs]), 1, 100),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
