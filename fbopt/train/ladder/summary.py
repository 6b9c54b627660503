"""What a ladder found: ladder.md (a table), ladder.json (everything) and the figures."""

from __future__ import annotations

import statistics
from typing import Any

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.recipes import RECIPES, accuracy, step_of_the_ladder
from fbopt.train.config.resolve import resolve
from fbopt.train.ladder.figures import draw_all
from fbopt.train.ladder.plan import Plan


def write(plan: Plan) -> str:
    """Write the files; returns the table, and where they are."""
    rows = [_row(plan, name) for name in plan.runs]
    text = table(rows)
    atomic.replace(plan.folder / "ladder.md", f"{text}\n\n    {plan.command}\n".encode())
    content = {"command": plan.command, "data": plan.wanted.data, "rows": rows}
    atomic.replace_json(plan.folder / "ladder.json", content)
    figures = draw_all(plan)
    names = ", ".join(["ladder.md", "ladder.json", *figures])
    return f"{text}\nwritten: {plan.folder}/ ({names})"


def _row(plan: Plan, name: str) -> dict[str, Any]:
    """All that is known of a row: its options, its finished runs, their means and deviations."""
    options = resolve(plan.runs[name][0])
    found = {o.seed: RunFolder(o.out) for o in plan.runs[name]}
    runs = [
        {"seed": seed, "folder": str(folder.path)} | folder.read_result()
        for seed, folder in found.items()
        if folder.result.exists()
    ]
    known = accuracy if options.scale == "images" else step_of_the_ladder
    return {
        "row": name,
        "summary": RECIPES[options.scale][name].summary,
        "published": known(name) or None,
        "options": options.as_json(),
        "seeds": len(plan.runs[name]),
        "test_accuracy": _spread([run["test_accuracy"] for run in runs]),
        "loss": _spread([run["loss"] for run in runs]),
        "seconds": _spread([run["seconds"] for run in runs]),
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
    lines = [
        "| row | test accuracy (%) | n | train loss | steps | gradients per sample | time per run "
        "| paper: CIFAR-10, augmented (%) |",
        "|---|---|---:|---|---:|---:|---:|---|",
    ]
    for row in rows:
        failed = row["seeds"] - len(row["runs"])
        cells = (
            f"`{row['row']}`",
            _words(row["test_accuracy"], 2, 100) + (f" ({failed} failed)" if failed else ""),
            str(len(row["runs"])),
            _words(row["loss"], 4),
            _range([run["step"] for run in row["runs"]]),
            _range([run["gradient_evaluations"] for run in row["runs"]]),
            _clock(row["seconds"]["mean"]) if row["runs"] else "",
            row["published"] or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(spread: dict[str, float | None] | None, digits: int, times: float = 1) -> str:
    if spread is None:
        return "–"
    text = f"{times * spread['mean']:.{digits}f}"
    if spread["deviation"] is not None:
        text += f" ± {times * spread['deviation']:.{digits}f}"
    return text


def _range(counts: list[int]) -> str:
    """One number where all runs have the same."""
    return " – ".join(f"{n:,}" for n in sorted({min(counts), max(counts)})) if counts else ""


def _clock(seconds: float) -> str:
    """A mean time per run."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
