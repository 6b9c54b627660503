"""The results of a ladder: ladder.md (a table), ladder.json (everything) and the figures."""

from __future__ import annotations

import statistics
from datetime import timedelta
from typing import Any

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, flag
from fbopt.train.config.recipes import published, summary
from fbopt.train.config.resolve import resolve
from fbopt.train.ladder.figures import draw_all
from fbopt.train.ladder.paired import baseline, difference
from fbopt.train.ladder.plan import Plan

HEAD = """\
| row | test accuracy (%) | minus sgd's (95 % interval) | n | train loss | steps \
| gradients per sample | sample passes (millions) | time per run (h:mm:ss) \
| paper: CIFAR-10, augmented (%) |
|---|---|---|---:|---|---:|---:|---:|---:|---|"""


def write(plan: Plan) -> str:
    """Write the files; returns the table, and where they are."""
    finished = {
        row: [folder for o in runs if (folder := RunFolder(o.out)).result.exists()]
        for row, runs in plan.runs.items()
    }
    rows = [_row(name, plan.runs[name], folders) for name, folders in finished.items()]
    by_name = {row["row"]: row for row in rows}
    for name, row in by_name.items():
        base = by_name.get(baseline(name))
        compared = base is not None and base is not row
        runs = (row["runs"], base["runs"], "test_accuracy") if compared else None
        row["difference"] = runs and difference(*runs)
        chosen = plan.tuned.get(name)
        row["tuned"] = chosen and chosen.as_json(plan.runs[name][0])
    text = table(rows)
    plan.folder.mkdir(parents=True, exist_ok=True)  # nothing may have been started
    atomic.replace(plan.folder / "ladder.md", f"{text}\n\n    {plan.command}\n".encode())
    content = {"command": plan.command, "data": plan.last_row_first[0].data, "rows": rows}
    atomic.replace_json(plan.folder / "ladder.json", content)
    differences = {name: d for name, row in by_name.items() if (d := row["difference"])}
    drawn = draw_all(plan, finished, differences)
    names = ", ".join(["ladder.md", "ladder.json", *drawn])
    return f"{text}\nwritten: {plan.folder}/ ({names})"


def _row(name: str, planned: list[Options], finished: list[RunFolder]) -> dict[str, Any]:
    """A row's options, its finished runs, and their means and deviations."""
    options, seeds = resolve(planned[0]), {o.out: o.seed for o in planned}
    runs = [{"seed": seeds[f.path], "folder": str(f.path)} | f.read_result() for f in finished]
    means = {k: spread([run[k] for run in runs]) for k in ("test_accuracy", "loss", "seconds")}
    return {
        "row": name,
        "summary": summary(name),
        "published": published(name, options.scale, options.model) or None,
        "options": options.as_json(),
        "seeds": len(planned),
        **means,
        "runs": runs,
    }


def spread(values: list[float]) -> dict[str, float | None] | None:
    """The mean and the sample standard deviation (None for one value); None for no value."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "n": len(values)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [HEAD]
    for row in rows:
        runs, missing = row["runs"], row["seeds"] - len(row["runs"])
        cells = (
            f"`{row['row']}`",
            words(row["test_accuracy"], 2, 100) + (f" ({missing} not finished)" if missing else ""),
            difference_words(row["difference"], len(runs)),
            str(len(runs)),
            words(row["loss"], 4),
            *(_range([run[key] for run in runs]) for key in ("step", "gradient_evaluations")),
            _range([run["sample_passes"] / 1e6 for run in runs if "sample_passes" in run], ",.2f"),
            str(timedelta(seconds=round(row["seconds"]["mean"]))) if runs else "",
            row["published"] or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(_tuned(row["row"], row["tuned"]) for row in rows if row.get("tuned"))]
    return "\n".join(lines).rstrip("\n")


def _tuned(name: str, found: dict[str, Any]) -> str:
    """How a row was tuned, as an item of a list."""
    chosen = ", ".join(f"{flag(k)} {v:.3g}" for k, v in found["options"].items())
    others = "; ".join(found["differences"])
    many = f"{found['trials']} trials of {found['passes']} passes"
    return f"- `{name}`, tuned in {many}: {chosen}" + (f" (with {others})" if others else "")


def difference_words(found: dict[str, Any] | None, runs: int) -> str:
    """Mean and interval in percentage points, with their signs; how many pairs, if not all runs."""
    if found is None:
        return "–"
    mean, *ends = (
        None if found[k] is None else f"{100 * found[k]:+.2f}" for k in ("mean", "low", "high")
    )
    text = (f"{mean} ({ends[0]} to {ends[1]})" if ends[0] else mean).replace("-", "−")
    return text if found["n"] == runs else f"{text}, n = {found['n']}"


def words(value: dict[str, float | None] | None, digits: int, times: float = 1) -> str:
    """Mean ± deviation."""
    found = [value["mean"], value["deviation"]] if value else []
    return " ± ".join(f"{times * v:.{digits}f}" for v in found if v is not None) or "–"


def _range(counts: list[float], form: str = ",") -> str:
    """Smallest and largest, or the one that all runs have."""
    ends = sorted({min(counts), max(counts)}) if counts else []
    return " – ".join(f"{n:{form}}" for n in ends)
