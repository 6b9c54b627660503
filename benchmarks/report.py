"""What a benchmark reports: the machine, tables in Markdown, and JSON with the same figures."""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fbopt
from benchmarks import PINNING
from benchmarks.timing import CPU, Table, Timing, quartiles
from fbopt._build import load
from fbopt.train.checkpoint.atomic import replace_json

RESULTS = Path(__file__).parent / "results"
QUICK_ROUNDS = 3
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
# Read, never set: a benchmark takes a GPU as it finds it.
SMI_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
# Instruction sets by name, the widest first, and the feature by which Linux says that they exist.
VECTORS = {"avx512": "avx512f", "avx2": "avx2", "sve": "sve", "neon": "asimd"}
BFLOAT16 = {"bf16": "avx512_bf16", "amx": "amx_bf16"}
# Columns of tables in which a row has the entry: heading, whether it is a time, and format.
COLUMNS = {
    "wall_s": ("wall", True, "{:.2f}"),
    "wall_ratio": ("its ratio", False, "{:.3f}"),
    "gb_per_s": ("GB/s", False, "{:.3g}"),
    "of_limit": ("of the limit", False, "{:.0%}"),
    "images_per_s": ("images/s", False, "{:,.0f}"),
    "peak_mb": ("peak MB", False, "{:,.1f}"),
}


def options(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, help="how often each contender has its turn")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="limit for a table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="three rounds, as a smoke test")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    return parser


class Report:
    """Prints facts and tables as they come, and writes them to a JSON file."""

    def __init__(
        self,
        name: str,
        choice: argparse.Namespace,
        argv: Sequence[str] | None = None,
        variant: str = "",
    ) -> None:
        torch.set_num_threads(choice.threads)
        self.name, self.variant, self.quick = name, variant, choice.quick
        self.arguments = sys.argv[1:] if argv is None else list(argv)
        self.tables: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.machine = machine(choice.device)
        print(", ".join(f"{key}: {value}" for key, value in self.machine.items()))

    def table(self, table: Table, base: Timing | None = None) -> None:
        """Print and keep a table; its ratios are to the row `base`, by default the first."""
        base = base or table.rows[0]
        rows = [entries(row, base, table.limit) for row in table.rows]
        self.tables.append({"title": table.title, "base": base.contender.name, "rows": rows})
        print(f"\n### {table.title}\n\n{markdown(rows, base.contender.name)}", flush=True)

    def write(self, folder: Path) -> Path:
        """Write the JSON, named after benchmark and hardware, and return its path."""
        hardware = self.machine.get("device") or hardware_name(cpu_name(), cpu_features())
        parts = [self.name, self.variant, hardware, "quick" * self.quick]
        name = "-".join(slug(part) for part in parts if part)
        command = " ".join(["python -m", f"benchmarks.{self.name}", *self.arguments])
        content = {"benchmark": self.name, "command": command, "machine": self.machine}
        path = folder / f"{name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(path, content | {"tables": self.tables} | self.facts)
        print(f"\nwrote {os.path.relpath(path)}")
        return path


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the figures depend on: hardware, versions and settings."""
    kernels = load.kernels()
    return gpu_facts(device) | {
        "cpu": cpu_name(),
        "instructions": " ".join(instruction_sets(cpu_features())),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": " ".join(f"{name}={os.environ.get(name, 'unset')}" for name in PINNING),
        "backend": "reference" if kernels is None else f"kernels ({kernels.instruction_set})",
        "torch": torch.__version__,
        "fbopt": fbopt.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name() -> str:
    """The name of the processor."""
    return cpu_fact("model name") or platform.processor() or platform.machine()


def cpu_features() -> set[str]:
    """What Linux calls the processor's features."""
    return set((cpu_fact("flags") or cpu_fact("Features")).split())


def cpu_fact(name: str) -> str:
    """A line about the first core; empty where the system does not say."""
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{name}\s*:\s*(.+)", path.read_text() if path.exists() else "", re.M)
    return found[1].strip() if found else ""


def instruction_sets(features: set[str]) -> list[str]:
    """The widest vectors of a processor, and what multiplies bfloat16 numbers."""
    widest = next((name for name in VECTORS if VECTORS[name] in features), None)
    found = [widest] if widest else []
    return found + [name for name, feature in BFLOAT16.items() if feature in features]


def hardware_name(cpu: str, features: set[str]) -> str:
    """A processor's name in that of a file: "AMD EPYC avx512"."""
    bare = re.sub(r"\((R|TM)\)|\bCPU\b|\b\d+-Core\b|\bProcessor\b|@.*", " ", cpu)
    sets = [name for name in instruction_sets(features) if name != "bf16"]
    return " ".join([*bare.split(), *sets])


def gpu_facts(device: torch.device) -> dict[str, str]:
    """The name and state of a GPU; nothing for the CPU."""
    if device.type != "cuda":
        return {}
    about = torch.cuda.get_device_properties(device)
    found = {
        "device": about.name,
        "capability": f"{about.major}.{about.minor}",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    command += ["-i", f"GPU-{about.uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return found | dict(zip(SMI_FIELDS, done.stdout.strip().split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return found


def compiles(device: torch.device) -> bool:
    """Whether torch.compile works for the device: it needs a compiler, and Triton on a GPU."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever it is, the other contenders can be timed
        print(f"nothing is timed compiled, torch.compile fails: {str(error).splitlines()[0]}")
        return False
    return True


def entries(row: Timing, base: Timing, limit: Timing | None) -> dict[str, Any]:
    """The figures of one contender; ratios are to `base`."""
    ratios, contender = row.over(base), row.contender
    found = {
        "name": contender.name,
        "median_s": row.median,
        "quartiles_s": quartiles(row.seconds),
        "fastest_s": min(row.seconds),
        "rounds": len(row.seconds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
    }
    if row.wall is not None:
        found |= {
            "wall_s": statistics.median(row.wall),
            "wall_quartiles_s": quartiles(row.wall),
            "wall_ratio": statistics.median(row.over(base, wall=True)),
        }
    if contender.words is not None:
        found |= {"words": contender.words, "gb_per_s": row.bandwidth}
        found |= {} if limit is None else {"of_limit": row.bandwidth / limit.bandwidth}
    if contender.samples is not None:
        found |= {"images": contender.samples, "images_per_s": contender.samples / row.median}
    if contender.peak_bytes is not None:
        found |= {"peak_mb": contender.peak_bytes / 1e6}
    return found


def markdown(rows: list[dict[str, Any]], base: str) -> str:
    """A table of entries as text."""
    fastest = min(row["median_s"] for row in rows)
    unit, symbol = next((u for u in UNITS if fastest >= u[0]), UNITS[-1])
    extra = {key: c for key, c in COLUMNS.items() if any(key in row for row in rows)}
    lines = [["", f"median {symbol}", "quartiles", f"ratio to {base}", "its quartiles"]]
    lines[0] += [f"{name} {symbol}" if timed else name for name, timed, _ in extra.values()]
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
    """Cells in columns, the first to the left and the others to the right, with a rule."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = []
    for first, *others in lines:
        right = (cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))
        padded.append([first.ljust(widths[0]), *right])
    padded.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def slug(text: str) -> str:
    """A name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
