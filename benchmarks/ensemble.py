"""Small networks trained at once by `fbopt train --seeds`, against as many runs of one network.

    python -m benchmarks.ensemble [--networks 32] [--recipes fb-clip fb-penalty] [--rounds 3]
                                  [--threads 2] [--quick]

Multilayer perceptrons on digits. Members are first compared with runs alone, in float64. Then, in
every round and in random order: all of them in one process with torch's threads; and two processes
at a time of one thread each, each of which trains its half one after the other. Counted are steps
of networks per second of training, as result.json has it, with logs and evaluations as in a run of
1,000 steps; start-up and pictures are not. The ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import require_close
from fbopt.train import loop, train, train_many
from fbopt.train.config.cores import usable_cores
from fbopt.train.config.options import Options
from fbopt.train.malloc import keep_freed

PROCESSES = 2
AT_LEAST = 5.0  # the ratio that is asked for
Throughputs = dict[str, list[float]]


def of(recipe: str, steps: int, **changes: Any) -> Options:
    """The options of all networks; sums in float32 alone, too."""
    records = {"eval_every": 10, "log_every": 2}
    return Options(
        data="digits", model="mlp", width=32, recipe=recipe, steps=steps, processes=1,
        accumulation="float32", **records, **changes,
    )  # fmt: skip


def check(recipe: str, folder: Path) -> None:
    """Compare members with runs alone. Raises AssertionError."""
    seeds, base = range(3), of(recipe, 10, precision="fp64")
    many = train_many([replace(base, seed=s, out=folder / f"many{s}") for s in seeds])
    for seed, member in zip(seeds, many, strict=True):
        alone = train(replace(base, seed=seed, out=folder / f"alone{seed}"))
        pairs = [list(run.model.parameters()) for run in (member, alone)]
        require_close(recipe, f"seed {seed}", *pairs, 1e-9)


def work(task: dict[str, Any]) -> None:
    """Train in this process what a worker is told to; print the seconds of training."""
    keep_freed()  # as by `fbopt train`
    out, seeds = Path(task["out"]), range(*task["seeds"])
    base = of(task["recipe"], task["steps"], **task["changes"])
    runs = [replace(base, seed=s, out=out / f"s{s}") for s in seeds]
    results = train_many(runs) if task["at_once"] else [train(run) for run in runs]
    seconds = [run.summary["seconds"] for run in results]
    print(json.dumps({"seconds": seconds[0] if task["at_once"] else sum(seconds)}))


def throughput(tasks: Sequence[dict[str, Any]], steps: int) -> float:
    """Steps of networks per second of processes that work side by side."""
    started = []
    with tempfile.TemporaryDirectory() as folder:
        for i, task in enumerate(tasks):
            words = [json.dumps(task | {"out": f"{folder}/{i}"})]
            if threads := task["changes"].get("threads"):
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            else:
                environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
            command = [sys.executable, "-m", "benchmarks.ensemble", "--worker", *words]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process of the benchmark failed; see above")
    slowest = max(json.loads(output.splitlines()[-1])["seconds"] for output in outputs)
    return sum(len(range(*task["seeds"])) for task in tasks) * steps / slowest


def contenders(recipe: str, networks: int, steps: int, threads: int | None) -> dict[str, Any]:
    """The tasks of the processes, by the contender's name."""
    common = {"recipe": recipe, "steps": steps}
    half = -(-networks // PROCESSES)
    shares = [(k, min(k + half, networks)) for k in range(0, networks, half)]
    many = {"at_once": True, "seeds": (0, networks), "changes": {"threads": threads}}
    found = {"at once": [common | many]}
    # Alone, too, chunks may go through the model at once: all twelve of them are fastest.
    for name, at_once in (("alone", None), ("alone, 12 chunks at once", 12)):
        changes = {"threads": 1, "vectorize": at_once}
        found[name] = [common | {"at_once": False, "seeds": s, "changes": changes} for s in shares]
    return found


def measure(recipe: str, choice: argparse.Namespace) -> float:
    """Time a recipe, print the table, and return the smallest of the median ratios."""
    tasks = contenders(recipe, choice.networks, choice.steps, choice.threads)
    found: Throughputs = {name: [] for name in tasks}
    order = random.Random(0)
    for _ in range(choice.rounds):
        for name in order.sample(list(tasks), len(tasks)):
            found[name].append(throughput(tasks[name], choice.steps))
    print(f"\n{recipe}, {choice.networks} networks, {choice.steps} steps, {choice.rounds} rounds")
    ratios = []
    for name, speeds in found.items():
        each = [a / b for a, b in zip(found["at once"], speeds, strict=True)]
        ratios.append(statistics.median(each))
        print(
            f"  {name:26} {statistics.median(speeds):8.0f} network-steps/s   at once is "
            f"{ratios[-1]:5.2f} times as fast ({min(each):.2f} to {max(each):.2f})",
            flush=True,
        )
    return min(ratios[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where a ratio is below what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=32)
    parser.add_argument("--recipes", nargs="+", default=["fb-clip", "fb-penalty"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the process that trains all at once")
    parser.add_argument("--quick", action="store_true", help="one round of ten steps")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    choice = parser.parse_args(argv)
    loop.draw_curves = lambda folder, options: False
    if choice.worker:
        work(json.loads(choice.worker))
        return 0
    if choice.quick:
        choice.rounds, choice.steps = 1, 10
    with tempfile.TemporaryDirectory() as folder:
        for recipe in choice.recipes:
            check(recipe, Path(folder) / recipe)
    cores = usable_cores()
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, {cores} cores, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}, at once with --threads {choice.threads or 'unset'}; "
        f"{PROCESSES} processes of 1 thread alone"
    )
    slowest = min(measure(recipe, choice) for recipe in choice.recipes)
    return int(slowest < AT_LEAST and not choice.quick)


if __name__ == "__main__":
    sys.exit(main())
