"""One table: the entries of its rows, which go into the JSON, and its text."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness import Timing, quartiles

Row = dict[str, Any]
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def entries(row: Timing, base: Timing, limit: Timing | None) -> Row:
    """What is told of one contender; ratios are to `base`."""
    ratios = row.over(base)
    found = {
        "name": row.name,
        "median_s": row.median,
        "quartiles_s": list(row.quartiles),
        "fastest_s": min(row.seconds),
        "rounds": len(row.seconds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": list(quartiles(ratios)),
    }
    if row.wall is not None:
        found |= {
            "wall_s": statistics.median(row.wall),
            "wall_quartiles_s": list(quartiles(row.wall)),
            "wall_ratio": statistics.median(row.over(base, wall=True)),
        }
    if row.words is not None:
        found |= {"words": row.words, "gb_per_s": row.rate}
        if limit is not None:
            found["of_limit"] = row.rate / limit.rate
    if row.items is not None:
        found |= {"images": row.items, "images_per_s": row.items / row.median}
    return found


# Columns that a table has if one of its rows has the entry: heading, unit of time or not, format.
COLUMNS = {
    "wall_s": ("wall", True, "{:.2f}"),
    "wall_ratio": ("its ratio", False, "{:.3f}"),
    "gb_per_s": ("GB/s", False, "{:.3g}"),
    "of_limit": ("of the limit", False, "{:.0%}"),
    "images_per_s": ("images/s", False, "{:,.0f}"),
}


def markdown(rows: list[Row], base: str) -> str:
    """The table as text."""
    unit, symbol = _unit(min(row["median_s"] for row in rows))
    extra = {key: c for key, c in COLUMNS.items() if any(key in row for row in rows)}
    head = ["", f"median {symbol}", "quartiles", f"ratio to {base}", "its quartiles"]
    head += [f"{name} {symbol}" if timed else name for name, timed, _ in extra.values()]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        first, third = (x / unit for x in row["quartiles_s"])
        low, high = row["ratio_quartiles"]
        cells = [row["name"], f"{row['median_s'] / unit:.2f}", f"{first:.2f} – {third:.2f}"]
        cells += [f"{row['ratio']:.3f}", f"{low:.3f} – {high:.3f}"]
        for key, (_, timed, form) in extra.items():
            value = row.get(key)
            cells.append("" if value is None else form.format(value / unit if timed else value))
        lines.append(cells)
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Cells under each other; the second line rules off the head and says which way they go."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rules, text = lines[1], []
    for number, line in enumerate(lines):
        fill = "-" if number == 1 else " "
        cells = zip(line, rules, widths, strict=True)
        padded = [c.rjust(w, fill) if r.endswith(":") else c.ljust(w, fill) for c, r, w in cells]
        text.append(f"| {' | '.join(padded)} |")
    return "\n".join(text)


def _unit(seconds: float) -> tuple[float, str]:
    return next((u for u in UNITS if seconds >= u[0]), UNITS[-1])
