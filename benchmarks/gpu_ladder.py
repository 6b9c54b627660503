"""Train the paper's rows at its own scale on a GPU, as long as there is time, and go on elsewhere.

    python -m benchmarks.gpu_ladder --data imagefolder:PATH [--minutes 9] [options of fbopt ladder]
    python -m benchmarks.gpu_ladder --rehearse

All images of CIFAR-10, resident on the GPU, ResNet-18, bfloat16, channels_last, compiled, in CUDA
graphs. benchmarks/ladder_scales.py says in which order, and estimates how long it takes.
`--minutes` is for the whole command: then the step in progress is finished, for at most 30 s, and
saved, and tables and the carried folder are written, which takes seconds. The same command goes on,
also on another machine that has the carried folder (benchmarks/carry.py) and the same images under
the same name. On the CPU it ends on the same bits; on a GPU it should, as cuDNN is told to add in a
fixed order. The exit status is 0, 1 (a run failed), 2 (bad input, no GPU) or 130 (stopped).
`--rehearse` shows all of this on the CPU, with two images per class.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import fbopt
from benchmarks import carry
from benchmarks.ladder_rehearsal import rehearse
from benchmarks.ladder_scales import STOPPED, Job, climb, write_results
from benchmarks.report import RESULTS, gpu_facts, slug
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError

NO_GPU = """No GPU: torch {torch} {why}. Nothing was written.
A rehearsal without one: make gpu-ladder ARGS="--rehearse\""""
OUT = Path("runs/gpu-ladder")
FAST = ("--device", "cuda", "--precision", "bf16", "--compile")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ladder or its rehearsal; the exit status is as described above."""
    begin = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", help="imagefolder:PATH with CIFAR-10's images, or cifar10")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for the whole command")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--out", type=Path, default=OUT, help=f"run folders; default {OUT}")
    parser.add_argument("--carry", type=Path, help="folder to carry; default: carry in --out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON and tables")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in two minutes")
    choice, more = parser.parse_known_args(words)
    if not choice.rehearse and not torch.cuda.is_available():
        why = "sees none" if torch.version.cuda else "is built without CUDA"
        print(NO_GPU.format(torch=torch.__version__, why=why), file=sys.stderr)
        return 2
    if (choice.data is None and not choice.rehearse) or not choice.minutes > 0:
        parser.error("--data imagefolder:PATH or cifar10 is needed, and --minutes above 0")
    command = shlex.join(["python", "-m", "benchmarks.gpu_ladder", *words])
    try:
        if choice.rehearse:
            return rehearse(choice.data)
        carried, deadline = choice.carry or choice.out / "carry", begin + 60 * choice.minutes
        options = (*FAST, *more)
        job = Job(choice.data, choice.out, carried, command, choice.seeds, options, deadline)
        status = climb(job)
        versions = {"torch": torch.__version__, "fbopt": fbopt.__version__}
        machine = gpu_facts(torch.device("cuda")) | versions
        stem = choice.results / f"gpu-ladder-{slug(machine['device'])}"
        write_results(job, stem, machine)
        print(f"wrote {stem}.json and .md")
        return status
    except (carry.CarryError, OptionsError, DataError) as error:
        print(f"gpu_ladder: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gpu_ladder: {error}; check the disk, then go on with\n  {command}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped between two runs; go on with\n  {command}", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
