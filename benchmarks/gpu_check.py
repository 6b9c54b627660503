"""The GPU check: builds, tests, sanitizes and times the CUDA kernels, a process for each stage.

    python -m benchmarks.gpu_check [build tests sanitize ops finishing graphs step] [--quick]

Writes one JSON file and one of Markdown, named after the device; stages that are run alone update
their own part of them. `--device cpu --quick` rehearses all stages without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import devices, processes
from benchmarks.dossier import merge, printed
from benchmarks.gpu import STAGES
from benchmarks.gpu.__main__ import FAILED, PASSED, UNAVAILABLE, options
from benchmarks.report import RESULTS, arguments, slug

NO_GPU = """No GPU: torch {torch} {why}. Nothing was checked.
A rehearsal without one, with figures that mean nothing: {command} --device cpu --quick"""
COMMAND = "python -m benchmarks.gpu_check"
CHILD = (sys.executable, "-m", "benchmarks.gpu")
TAIL = 5


def run_stage(
    stage: str, choice: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run a stage in a process of its own and return its part of the results, however it ended."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{stage}.json")
        done = processes.run([*CHILD, stage, str(file), *choice], seconds, environment)
        part = json.loads(file.read_text()) if file.exists() else {"tables": [], "goals": []}
    if "status" not in part:
        late = f"stopped after {seconds:.0f} s"
        part["status"] = FAILED
        part["why"] = late if done.status is None else f"ended with exit status {done.status}"
        part["output"] = "\n".join(done.output.splitlines()[-TAIL:])
        part["seconds"] = round(time.monotonic() - start, 1)
    part["command"] = " ".join([COMMAND, stage, *choice])
    return part


def environment(stage: str, device: str) -> dict[str, str]:
    """What a stage runs with: on a GPU the kernels or an error, never plain torch in their place.

    The tests choose for themselves.
    """
    found = dict(os.environ)
    if device == "cuda" and stage != "tests":
        found["FBOPT_BACKEND"] = "kernels"
    return found


def file_stem(device: torch.device, quick: bool) -> str:
    """The name of the results: the GPU's, or one that no one takes for results."""
    if device.type == "cpu":
        return "gpu-rehearsal"
    return f"gpu-{slug(devices.name(device))}{'-quick' * quick}"


def passed_on(choice: argparse.Namespace) -> list[str]:
    """The command line of a stage."""
    words = ["--device", choice.device, "--stage-seconds", f"{choice.stage_seconds:g}"]
    words += ["--quick"] if choice.quick else []
    for name in ("rounds", "images"):
        value = getattr(choice, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return [*words, "--precisions", *choice.precisions]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if none failed, 1 if one did, 2 without a GPU."""
    parser = options(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    choice = parser.parse_args(argv)
    if unknown := sorted(set(choice.stages) - set(STAGES)):
        parser.error(f"no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    if choice.device == "cuda" and not torch.cuda.is_available():
        why = "sees none" if torch.version.cuda else "is built without CUDA"
        print(NO_GPU.format(torch=torch.__version__, why=why, command=COMMAND), file=sys.stderr)
        return 2
    device = torch.device(choice.device)
    stem = choice.out / file_stem(device, choice.quick)
    parts = {}
    for stage in STAGES:
        if stage not in (choice.stages or STAGES):
            continue
        print(f"\n== stage {stage}", flush=True)
        limits = choice.stage_seconds, environment(stage, choice.device)
        parts[stage] = run_stage(stage, passed_on(choice), *limits)
        content = merge(stem, {stage: parts[stage]}, " ".join([COMMAND, *arguments(argv)]))
    print(printed(content, parts))
    print(f"\nwrote {stem}.json and {stem}.md")
    return int(any(part["status"] not in (PASSED, UNAVAILABLE) for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
