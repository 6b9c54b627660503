"""The results of a ladder: ladder.md (a table), ladder.json (everything) and the figures."""

from __future__ import annotations

import statistics
from datetime import timedelta
from typing import Any

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.recipes import published, summary
from fbopt.train.config.resolve import resolve
from fbopt.train.ladder.figures import draw_all
from fbopt.train.ladder.plan import Plan

HEAD = """\
| row | test accuracy (%) | n | train loss | steps | gradients per sample \
| time per run (h:mm:ss) | paper: CIFAR-10, augmented (%) |
|---|---|---:|---|---:|---:|---:|---|"""


def write(plan: Plan) -> str:
    """Write the files; returns the table, and where they are."""
    rows = [_row(plan, name) for name in plan.runs]
    text = table(rows)
    atomic.replace(plan.folder / "ladder.md", f"{text}\n\n    {plan.command}\n".encode())
    content = {"command": plan.command, "data": plan.wanted.data, "rows": rows}
    atomic.replace_json(plan.folder / "ladder.json", content)
    names = ", ".join(["ladder.md", "ladder.json", *draw_all(plan)])
    return f"{text}\nwritten: {plan.folder}/ ({names})"


def _row(plan: Plan, name: str) -> dict[str, Any]:
    """A row's options, its finished runs, and their means and deviations."""
    options = resolve(plan.runs[name][0])
    found = {o.seed: RunFolder(o.out) for o in plan.runs[name]}
    runs = [
        {"seed": seed, "folder": str(folder.path)} | folder.read_result()
        for seed, folder in found.items()
        if folder.result.exists()
    ]
    return {
        "row": name,
        "summary": summary(name),
        "published": published(name, options.scale) or None,
        "options": options.as_json(),
        "seeds": len(plan.runs[name]),
        **{
            key: _spread([run[key] for run in runs]) for key in ("test_accuracy", "loss", "seconds")
        },
        "runs": runs,
    }


def _spread(values: list[float]) -> dict[str, float | None] | None:
    """The mean and the sample standard deviation (None for one value); None for no value."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "n": len(values)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [HEAD]
    for row in rows:
        failed = row["seeds"] - len(row["runs"])
        cells = (
            f"`{row['row']}`",
            _words(row["test_accuracy"], 2, 100) + (f" ({failed} failed)" if failed else ""),
            str(len(row["runs"])),
            _words(row["loss"], 4),
            _range([run["step"] for run in row["runs"]]),
            _range([run["gradient_evaluations"] for run in row["runs"]]),
            str(timedelta(seconds=round(row["seconds"]["mean"]))) if row["runs"] else "",
            row["published"] or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(spread: dict[str, float | None] | None, digits: int, times: float = 1) -> str:
    """Mean ± deviation."""
    if spread is None:
        return "–"
    found = (spread["mean"], spread["deviation"])
    return " ± ".join(f"{times * value:.{digits}f}" for value in found if value is not None)


def _range(counts: list[int]) -> str:
    """Smallest and largest, or the one that all runs have."""
    return " – ".join(f"{n:,}" for n in sorted({min(counts), max(counts)})) if counts else ""
