"""The results of a ladder: ladder.md (a table), ladder.json (everything) and four figures."""

from __future__ import annotations

import statistics
from datetime import timedelta
from typing import Any

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.config.recipes import STEPS, TABLES, published, summary
from fbopt.train.config.resolve import resolve
from fbopt.train.ladder.plan import Plan
from fbopt.train.reporting import plots

HEAD = """\
| row | test accuracy (%) | n | train loss | steps | gradients per sample \
| time per run (h:mm:ss) | paper: CIFAR-10, augmented (%) |
|---|---|---:|---|---:|---:|---:|---|"""
FIGURES = {  # panels: metric, title, axis label
    "accuracy": [("test_accuracy", "Test accuracy (bands: all seeds)",
                  "correctly classified samples (%)")],
    "gradients": [("gradient_norm", "Gradient norm before clipping (sgd: last mini-batch)",
                   "Euclidean norm"),
                  ("clip", "Clip coefficient", "factor (1: not clipped)")],
    "chunks": [("mean_squared_chunk_norm", "Gradient norms of chunks (sgd: mini-batches)",
                "root mean square of the norms")],
    "loss": [("loss", "Training loss", "mean cross-entropy (nats)")],
}  # fmt: skip
X_LABELS = {
    "step": "optimizer steps (of mini-batches for sgd, of all samples for the rest)",
    "pass": "passes over the training set (steps, or epochs of sgd)",
}
LOOKS = {  # the colour is the row's step of the ladder, the line style its kind of augmentation
    step + suffix: {"color": color, "linestyle": line}
    for step, color in zip(STEPS, plots.PALETTE, strict=False)
    for suffix, line in zip(TABLES, ("-", "--", "-.", ":"), strict=True)
}


def write(plan: Plan) -> str:
    """Write the files; returns the table, and where they are."""
    finished = {
        row: [folder for o in runs if (folder := RunFolder(o.out)).result.exists()]
        for row, runs in plan.runs.items()
    }
    rows = [_row(name, plan.runs[name], folders) for name, folders in finished.items()]
    text = table(rows)
    plan.folder.mkdir(parents=True, exist_ok=True)  # nothing may have been started
    atomic.replace(plan.folder / "ladder.md", f"{text}\n\n    {plan.command}\n".encode())
    content = {"command": plan.command, "data": plan.last_row_first[0].data, "rows": rows}
    atomic.replace_json(plan.folder / "ladder.json", content)
    names = ", ".join(["ladder.md", "ladder.json", *draw_all(plan, finished)])
    return f"{text}\nwritten: {plan.folder}/ ({names})"


def _row(name: str, planned: list[Options], finished: list[RunFolder]) -> dict[str, Any]:
    """A row's options, its finished runs, and their means and deviations."""
    options, seeds = resolve(planned[0]), {o.out: o.seed for o in planned}
    runs = [{"seed": seeds[f.path], "folder": str(f.path)} | f.read_result() for f in finished]
    means = {k: _spread([run[k] for run in runs]) for k in ("test_accuracy", "loss", "seconds")}
    return {
        "row": name,
        "summary": summary(name),
        "published": published(name, options.scale, options.model) or None,
        "options": options.as_json(),
        "seeds": len(planned),
        **means,
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
        runs, missing = row["runs"], row["seeds"] - len(row["runs"])
        cells = (
            f"`{row['row']}`",
            _words(row["test_accuracy"], 2, 100)
            + (f" ({missing} not finished)" if missing else ""),
            str(len(runs)),
            _words(row["loss"], 4),
            *(_range([run[key] for run in runs]) for key in ("step", "gradient_evaluations")),
            str(timedelta(seconds=round(row["seconds"]["mean"]))) if runs else "",
            row["published"] or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(spread: dict[str, float | None] | None, digits: int, times: float = 1) -> str:
    """Mean ± deviation."""
    found = [spread["mean"], spread["deviation"]] if spread else []
    return " ± ".join(f"{times * v:.{digits}f}" for v in found if v is not None) or "–"


def _range(counts: list[int]) -> str:
    """Smallest and largest, or the one that all runs have."""
    return " – ".join(f"{n:,}" for n in sorted({min(counts), max(counts)})) if counts else ""


def draw_all(plan: Plan, finished: dict[str, list[RunFolder]]) -> list[str]:
    """Draw the figures of the finished runs into the ladder's folder; returns their names."""
    rows = {row: [f.read_metrics() for f in folders] for row, folders in finished.items()}
    first, *more = next(iter(plan.runs.values()))
    heading = f"{first.data_name}, {f'mean of {1 + len(more)} seeds' if more else 'one seed'}"
    for name, panels in FIGURES.items():
        if not any(rows.values()) or (page := plots.figure(7.5, 2 + 2.5 * len(panels))) is None:
            return []
        all_axes = page.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        x = "step" if name == "accuracy" else "pass"
        for axes, (key, title, label) in zip(all_axes, panels, strict=True):
            _draw(axes, key, x, rows)
            axes.set(title=title, ylabel=label)
        plots.log_steps(all_axes[-1], X_LABELS[x])
        all_axes[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        page.suptitle(heading)
        page.savefig(plan.folder / f"{name}.png")
    return [f"{name}.png" for name in FIGURES]


def _draw(axes: Any, key: str, x: str, rows: dict[str, list[plots.Records]]) -> None:
    """Draw a metric of each row."""
    for row, runs in rows.items():
        plots.draw_line(axes, runs, key, x, label=row, **LOOKS[row])
    if key == "clip":
        axes.set_ylim(0, 1.05)
    elif key != "test_accuracy":
        plots.log_scale(axes)
    plots.tidy(axes)
