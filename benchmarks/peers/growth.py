"""How the time of a penalised gradient grows: `benchmarks.step --peers --growth`.

Of a tanh network: with the number of chunks, their size, the parameters, and the processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.peers.workload import Workload
from benchmarks.peers.workloads import workload
from benchmarks.timing import Timing

CHUNKS, SAMPLES, WIDTH = 32, 32, 64
COUNTS, SIZES = (1, 2, 4, 8, 16, 32, 64, 128), (8, 16, 32, 64, 128, 256)
WIDTHS = (8, 16, 32, 64, 128, 256, 512)
QUICK = (1, 2)
# The lines of the figure by what contenders are called; of one line the fastest counts.
LINES = {
    "plain torch": "plain torch",
    "JAX jit, a loop": "JAX, the best of three",
    "JAX jit(scan)": "JAX, the best of three",
    "JAX jit(vmap)": "JAX, the best of three",
    "fbopt": "fbopt, chunk by chunk",
    "fbopt, all at once": "fbopt, all chunks at once",
    "fbopt, all at once, compiled": "fbopt, all at once, compiled",
}


@dataclass
class Axis:
    """One of the panels: the seconds of a call by line and by what grows."""

    label: str
    title: str
    curves: dict[str, dict[int, float]] = field(default_factory=dict)

    def draws(self, name: str) -> bool:
        """Whether a contender is one of its lines."""
        return self.place(name, 0) is not None

    def place(self, name: str, value: int) -> tuple[str, int] | None:
        """The line that a contender belongs to, and where on the axis it is."""
        name = name.partition(" (")[0]
        if self.label == "processes":
            found = re.fullmatch(r"fbopt, (\d+) process(?:es)?(.*)", name)
            return found and (LINES[f"fbopt{found[2]}"], int(found[1])) if found else None
        return (LINES[name], value) if name in LINES else None

    def add(self, rows: Sequence[Timing], value: int) -> None:
        """Add what was measured at a value."""
        for row in rows:
            line, place = self.place(row.contender.name, value)
            curve = self.curves.setdefault(line, {})
            curve[place] = min(row.median, curve.get(place, row.median))


@dataclass(frozen=True)
class Point:
    """A workload, and its value on an axis."""

    axis: Axis
    value: int
    workload: Workload


def points(quick: bool) -> Iterator[Point]:
    """All sizes, axis by axis."""
    fixed = f"{CHUNKS} chunks of {SAMPLES}"
    counts = Axis("chunks", f"chunks of {SAMPLES}")
    sizes = Axis("samples in a chunk", f"{CHUNKS} chunks")
    for value in QUICK if quick else COUNTS:
        yield Point(counts, value, of_size(chunks=value))
    for value in QUICK if quick else SIZES:
        yield Point(sizes, value, of_size(samples=value))
    parameters = Axis("parameters", fixed)
    for width in QUICK if quick else WIDTHS:
        found = of_size(width=width)
        yield Point(parameters, sum(w.size for w in found.weights.values()), found)
    most = max(QUICK if quick else COUNTS)
    processes = Axis("processes", f"{most} chunks of {SAMPLES}, one thread for each process")
    yield Point(processes, 0, of_size(chunks=most))


def of_size(chunks: int = CHUNKS, samples: int = SAMPLES, width: int = WIDTH) -> Workload:
    """A workload of the tanh network."""
    found = workload("mlp", chunks * samples, samples, width)
    return replace(found, title=f"tanh network 64-{width}-{width}-{width}-10")
