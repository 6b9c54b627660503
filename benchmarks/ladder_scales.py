"""The ladder at several scales, the cheapest first: what is run, in which order, and its results.

Estimates for an H200, not measured. A gradient takes three times the 1.11 GFLOP of a forward pass
(ResNet-18 for CIFAR: 0.56 GMAC per image), and 7.5 to 15 % of the 989 TFLOP/s of dense bfloat16 are
reached: 22,000 to 45,000 images/s at width 64; three times as many at width 16, which has a
sixteenth of the products and a quarter of the memory; half as many in chunks of 32. So, for 50,000
images and one seed:

| scale | row | gradients per image | hours |
|---|---|---:|---:|
| width 16, a tenth of the steps | sgd, fb-clip, fb-penalty | 30, 300, 600 | 0.1 to 0.2 |
| width 64, a tenth of the steps | the same | 30, 300, 600 | 0.3 to 0.6 |
| width 64 | sgd-aug | 300 | 0.1 to 0.2 |
| width 64 | fb-clip-aug | 3,000 | 0.9 to 1.9 |
| width 64 | fb-penalty-aug | 6,000 | 1.9 to 3.8 |
| width 64 | fb-strong-aug | 6,000 | 3.7 to 7.6 |

To these come a minute or two for each start of a run, which compiles first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import carry
from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import parse
from fbopt.train.config.resolve import resolve
from fbopt.train.ladder import speed, summary
from fbopt.train.ladder.plan import Ladder, Plan, make_plan
from fbopt.train.ladder.runner import run_all

STOPPED = 130
GRACE_SECONDS = 30.0  # for the step in progress, after the budget; the first of a run compiles
KEPT = (
    "pass", "step", "gradient_evaluations", "loss", "train_accuracy", "test_accuracy", "test_loss",
    "seconds",
)  # fmt: skip
OPTIONS = (
    "model", "width", "steps", "epochs", "chunk_size", "batch_size", "augment", "precision",
    "channels_last", "compile", "cuda_graph", "accumulation",
)  # fmt: skip


class Scale(NamedTuple):
    """A folder of runs: the width of ResNet-18, the share of the steps, and the rows."""

    folder: str
    width: int
    share: float
    rows: tuple[str, ...]


SHORT = ("sgd-aug", "fb-clip-aug", "fb-penalty-aug")
SCALES = (
    Scale("width-16-tenth", 16, 0.1, SHORT),
    Scale("width-64-tenth", 64, 0.1, SHORT),
    Scale("width-64", 64, 1.0, (*SHORT, "fb-strong-aug")),
)


@dataclass(frozen=True)
class Job:
    """The runs, where their folders lie, what is carried, and when to stop.

    Args:
        data: a value of `--data`.
        out: the folder with a folder for each scale.
        carried: the folder that is carried.
        command: that goes on.
        seeds: runs of each row.
        words: more options of `fbopt ladder`.
        deadline: by `time.monotonic()`.
        part_bytes: of a carried file at most.
    """

    data: str
    out: Path
    carried: Path
    command: str
    seeds: int = 3
    words: tuple[str, ...] = ()
    deadline: float = math.inf
    scales: tuple[Scale, ...] = SCALES
    part_bytes: int = carry.PART_BYTES
    plans: dict[str, Plan] = field(init=False)  # by the scale's folder; raises OptionsError

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", {s.folder: self._plan(s) for s in self.scales})

    def _plan(self, scale: Scale) -> Plan:
        words = ["--data", self.data, "--out", str(self.out / scale.folder), "--jobs", "1"]
        words += ["--rows", *scale.rows, "--seeds", str(self.seeds), "--share", str(scale.share)]
        words += ["--model", "resnet18", "--width", str(scale.width)]
        given = {word.partition("=")[0] for word in self.words if word.startswith("--")}
        if taken := sorted(given.intersection(words)):
            raise OptionsError(f"{taken[0]} is set for every scale; leave it out")
        words += self.words
        plan = make_plan(*parse("fbopt ladder", words, Ladder, Options), self.command)
        return replace(plan, deadline=self.deadline, grace=GRACE_SECONDS)

    def in_order(self) -> Iterator[tuple[str, Options]]:
        """Scales and runs: all of a seed before the next, within it the small scales first."""
        for seed in range(self.seeds):
            for scale in self.scales:
                for runs in self.plans[scale.folder].runs.values():
                    yield scale.folder, runs[seed]

    def left(self) -> list[tuple[str, Options]]:
        """Those that are not finished."""
        return [(scale, o) for scale, o in self.in_order() if not RunFolder(o.out).result.exists()]


def climb(job: Job) -> int:
    """Take over what was carried, train what is left, and pack it; after each run, the table.

    Returns 0, 1 (a run failed; the others went on) or 130 (stopped by a signal or the deadline, the
    same command goes on). Raises CarryError, OptionsError or DataError before anything is changed.
    """
    taken = carry.unpack(job.carried, job.out)
    for path in taken:
        print(f"taken over from {job.carried}: {path}")
    for plan in job.plans.values():
        if plan.folder in {path.parent for path in taken}:
            summary.write(plan)
    left, statuses = job.left(), []
    total = sum(1 for _ in job.in_order())
    print(f"{total - len(left)} of {total} runs are finished", flush=True)
    for scale, options in left:
        if time.monotonic() > job.deadline:
            statuses.append(STOPPED)
            break
        print(f"\n== {scale}: {options.recipe}, seed {options.seed}", flush=True)
        plan = job.plans[scale]
        statuses.append(run_all(replace(plan, runs={options.recipe: [options]})))
        print(f"\n{summary.write(plan)}", flush=True)
        packed = carry.pack(job.out, job.carried, job.part_bytes)
        if statuses[-1] == STOPPED:
            print(f"\nto carry: {job.carried}/ ({packed})")
            break
    if STOPPED in statuses:
        print(f"stopped, what was running is saved; go on with\n  {job.command}", flush=True)
    return max(statuses, default=0)


def write_results(job: Job, stem: Path, machine: dict[str, Any]) -> None:
    """Write STEM.json, with every run that has begun, and STEM.md, with the tables."""
    scales = []
    text = [f"# The ladder at scale: {machine.get('device', 'a rehearsal without a GPU')}"]
    text += ["\n".join(f"- {key}: {value}" for key, value in machine.items())]
    for scale in job.scales:
        plan = job.plans[scale.folder]
        runs = [found for o in _seed_by_seed(plan) if (found := _run(o)) is not None]
        scales.append(scale._asdict() | {"runs": runs})
        if (table := plan.folder / "ladder.md").exists():
            text += [f"## {scale.folder}", table.read_text().partition("\n\n    ")[0]]
    name = job.plans[job.scales[0].folder].last_row_first[0].data_name
    content = {"benchmark": "gpu_ladder", "machine": machine, "data": name}
    stem.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace_json(Path(f"{stem}.json"), content | {"scales": scales})
    Path(f"{stem}.md").write_text("\n\n".join(text) + "\n")


def _seed_by_seed(plan: Plan) -> list[Options]:
    return [o for runs in zip(*plan.runs.values(), strict=True) for o in runs]


def _run(options: Options) -> dict[str, Any] | None:
    """The speed of a run and what it came to so far; None if it has no metrics."""
    folder = RunFolder(options.out)
    if not (lines := folder.read_metrics()):
        return None
    measured = speed.measure(options)
    devices = [line["device"] for line in atomic.read_lines(folder.environment)]
    last = json.loads(folder.result.read_text()) if folder.result.exists() else lines[-1]
    return {
        "row": options.recipe,
        "seed": options.seed,
        "finished": folder.result.exists(),
        "options": {name: getattr(resolve(options), name) for name in OPTIONS},
        "devices": list(dict.fromkeys(devices)),
        "images_per_s": measured and measured.images_per_s,
        "gradients_per_image": measured and measured.gradients,
        "measured_steps": measured and measured.steps,
        **{key: last[key] for key in KEPT if key in last},
    }
