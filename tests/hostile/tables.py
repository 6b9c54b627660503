"""Tables of what was tried and how it ended, as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """A line of a table, and whether it is as it has to be."""

    cells: tuple[str, ...]
    holds: bool


def show(row: Row) -> None:
    """Tell how a trial ended, while others are to come."""
    print(f"{'ok    ' if row.holds else 'FAILED'}  {' | '.join(row.cells)}", file=sys.stderr)


def markdown(header: Sequence[str], rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    lines = [header, ["---"] * len(header), *(row.cells for row in rows)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
