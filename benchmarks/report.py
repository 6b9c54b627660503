"""What a benchmark tells: tables with ratios, goals met and missed, the machine, and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fbopt
from benchmarks import PINNING
from benchmarks.harness import Timing, Timings, quartiles
from fbopt import _build

RESULTS = Path(__file__).parent / "results"
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def options(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, help="how often each contender gets its turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that all works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    return parser


@dataclass
class Report:
    """Collects tables and goals, prints them as they come, writes them to one JSON file."""

    name: str
    arguments: Sequence[str]
    tables: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = machine()
        print(", ".join(f"{key}: {value}" for key, value in self.machine.items()))

    def table(self, timings: Timings, limit: Timing | None = None, base: str | None = None) -> None:
        """Print and keep one table; ratios are to `base`, the first row unless named."""
        reference = timings[base] if base else timings.rows[0]
        rows = [_row(row, reference, limit) for row in timings.rows]
        self.tables.append({"title": timings.title, "base": reference.name, "rows": rows})
        print(f"\n### {timings.title}\n\n{_markdown(rows, reference.name)}")

    def goal(
        self,
        about: str,
        claim: str,
        value: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Print and keep a ratio, with the bound it should reach if there is one.

        `about` is the table it comes from.
        """
        goal, met = None, None
        if at_least is not None:
            goal, met = f"≥ {at_least:g}", value >= at_least
        elif at_most is not None:
            goal, met = f"≤ {at_most:g}", value <= at_most
        self.goals.append(
            {"about": about, "claim": claim, "value": value, "goal": goal, "met": met}
        )
        bound = f" (goal {goal}: {'met' if met else 'missed'})" if goal else ""
        print(f"- {claim}: {value:.3f}{bound}")

    def heading(self, text: str) -> None:
        """Print a line that opens a list."""
        print(f"\n{text}")

    def write(self, folder: Path) -> Path:
        """Write the JSON and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{_slug(self.machine['cpu'])}.json"
        command = " ".join(["python -m", f"benchmarks.{self.name}", *self.arguments])
        content = {"benchmark": self.name, "command": command, "machine": self.machine}
        content |= {"tables": self.tables, "goals": self.goals}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"\nwrote {os.path.relpath(path)}")
        return path


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    openmp = " ".join(f"{name}={os.environ.get(name, 'unset')}" for name in PINNING)
    kernels = _build.kernels()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": openmp,
        "backend": "reference" if kernels is None else f"kernels ({kernels.instruction_set})",
        "torch": torch.__version__,
        "fbopt": fbopt.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _row(row: Timing, base: Timing, limit: Timing | None) -> dict[str, Any]:
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
    if row.words is not None:
        found |= {"words": row.words, "gb_per_s": row.rate}
        if limit is not None:
            found["of_limit"] = row.rate / limit.rate
    return found


def _markdown(rows: list[dict[str, Any]], base: str) -> str:
    unit, symbol = _unit(min(row["median_s"] for row in rows))
    with_rate = any("words" in row for row in rows)
    with_limit = any("of_limit" in row for row in rows)
    head = ["", f"median {symbol}", "quartiles", f"ratio to {base}", "its quartiles"]
    head += ["GB/s"] * with_rate + ["of the limit"] * with_limit
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        first, third = (x / unit for x in row["quartiles_s"])
        low, high = row["ratio_quartiles"]
        cells = [row["name"], f"{row['median_s'] / unit:.2f}", f"{first:.2f} – {third:.2f}"]
        cells += [f"{row['ratio']:.3f}", f"{low:.3f} – {high:.3f}"]
        cells += [f"{row['gb_per_s']:.3g}" if "words" in row else ""] * with_rate
        cells += [f"{row['of_limit']:.0%}" if "of_limit" in row else ""] * with_limit
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    fill = "-" if set(cells[0]) == {"-"} else " "
    padded = [first[0].ljust(first[1], fill)]
    padded += [(f"{'-' * (w - 1)}:" if fill == "-" else c.rjust(w)) for c, w in rest]
    return f"| {' | '.join(padded)} |"


def _unit(seconds: float) -> tuple[float, str]:
    return next((u for u in UNITS if seconds >= u[0]), UNITS[-1])


def arguments(argv: Sequence[str] | None) -> list[str]:
    """The command line, without the program."""
    return list(sys.argv[1:] if argv is None else argv)
