"""What a benchmark tells: tables with ratios, goals met and missed, the machine, and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fbopt
from benchmarks import PINNING
from benchmarks.devices import CPU, cpu_name, facts
from benchmarks.harness import Timing, Timings
from benchmarks.tables import entries, markdown
from fbopt._build import load as _build

RESULTS = Path(__file__).parent / "results"


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
    """Collects facts, tables and goals, prints them as they come, writes them to a JSON file.

    With a `path`, the file is written anew at every table and goal: a run that is cut short leaves
    what it had.
    """

    name: str
    arguments: Sequence[str]
    device: torch.device = CPU
    path: Path | None = None
    facts: dict[str, str] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = machine(self.device)
        print(", ".join(f"{key}: {value}" for key, value in self.machine.items()))

    def fact(self, what: str, value: object) -> None:
        """Print and keep something that is no time."""
        self.facts[what] = str(value)
        print(f"- {what}: {value}", flush=True)
        self._keep()

    def table(self, timings: Timings, limit: Timing | None = None, base: str | None = None) -> None:
        """Print and keep one table; ratios are to `base`, the first row unless named."""
        reference = timings[base] if base else timings.rows[0]
        limits = [timings[row.limit] if row.limit else limit for row in timings.rows]
        rows = [entries(row, reference, of) for row, of in zip(timings.rows, limits, strict=True)]
        self.tables.append({"title": timings.title, "base": reference.name, "rows": rows})
        print(f"\n### {timings.title}\n\n{markdown(rows, reference.name)}", flush=True)
        self._keep()

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
        print(f"- {claim}: {value:.3f}{bound}", flush=True)
        self._keep()

    def heading(self, text: str) -> None:
        """Print a line that opens a list."""
        print(f"\n{text}")

    def write(self, folder: Path) -> Path:
        """Write the JSON and return its path."""
        path = folder / f"{self.name}-{slug(self.machine['cpu'])}.json"
        write_json(path, self.content())
        print(f"\nwrote {os.path.relpath(path)}")
        return path

    def content(self) -> dict[str, Any]:
        """All that was collected."""
        command = " ".join(["python -m", f"benchmarks.{self.name}", *self.arguments])
        content = {"benchmark": self.name, "command": command, "machine": self.machine}
        content |= {"facts": self.facts} if self.facts else {}
        return content | {"tables": self.tables, "goals": self.goals}

    def _keep(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people to read too, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    scratch.replace(path)


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the figures depend on."""
    openmp = " ".join(f"{name}={os.environ.get(name, 'unset')}" for name in PINNING)
    kernels = _build.kernels()
    found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": openmp,
        "backend": "reference" if kernels is None else f"kernels ({kernels.instruction_set})",
        "torch": torch.__version__,
        "fbopt": fbopt.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found if device.type == "cpu" else facts(device) | found


def slug(text: str) -> str:
    """A name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def arguments(argv: Sequence[str] | None) -> list[str]:
    """The command line, without the program."""
    return list(sys.argv[1:] if argv is None else argv)
