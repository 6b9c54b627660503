"""Build, test, sanitize and time the CUDA kernels, each stage in a process with a time limit.

    python -m benchmarks.gpu_check [build tests sanitize ops step train_step] [--quick]

Prints what the stages print, and writes gpu-check-DEVICE.json and .md to benchmarks/results, beside
the JSON of each benchmark; a stage that is run alone updates its own part. `--device cpu` rehearses
all stages without a GPU, quickly: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_stages import CAPTURED, UNAVAILABLE
from benchmarks.report import RESULTS, aligned, gpu_facts, slug
from fbopt.train.checkpoint.atomic import replace_json

NO_GPU = """No GPU: torch {torch} {why}. Nothing was checked.
A rehearsal without one: python -m benchmarks.gpu_check --device cpu"""
# Arguments of each benchmark on a GPU, and in a rehearsal. `--seconds` limits a table; all tables
# of a stage, with the checks before them, fit into the nine minutes of a stage.
BENCHMARKS = {
    "ops": (
        "--sizes resnet18 tiny large --compile resnet18 --seconds 30",
        "--sizes small-cnn --no-compile --threads 1",
    ),
    "step": (
        "--sizes resnet18 --chunk 128 --chunks 8 --precision fp32 bf16 --seconds 60",
        "--sizes small-cnn --threads 1",
    ),
    "train_step": (
        "--width 64 --images 10240 --precision bf16 --penalty --workers 8 --seconds 120",
        "--width 2 --images 20 --chunk 8 --workers 0 --threads 1",
    ),
}
STAGES = ("build", "tests", "sanitize", *BENCHMARKS)


def command_of(stage: str, choice: argparse.Namespace) -> list[str]:
    """The command line of a stage."""
    if stage not in BENCHMARKS:
        words = ["benchmarks.gpu_stages", stage, "--seconds", f"{0.9 * choice.stage_seconds:g}"]
        return [sys.executable, "-m", *words, "--device", choice.device]
    words = BENCHMARKS[stage][choice.device == "cpu"].split() + ["--quick"] * choice.quick
    words += ["--device", choice.device, "--out", str(choice.out)]
    return [sys.executable, "-m", f"benchmarks.{stage}", *words]


def run(
    command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[int | None, str]:
    """Run a command and pass its output on; return its exit status, None if late, and the output.

    When it ends, all processes that it has started end too.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True, **CAPTURED)
    late, lines = threading.Event(), []
    timer = threading.Timer(seconds, lambda: (late.set(), _kill(process)))
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
        status = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    return None if late.is_set() else status, "".join(lines)


def _kill(process: subprocess.Popen) -> None:
    """Kill what is left of the process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of one that has ended
        return
    process.wait()


def run_stage(stage: str, choice: argparse.Namespace) -> dict[str, Any]:
    """Run a stage and return its record, however it ended."""
    command, start = command_of(stage, choice), time.monotonic()
    # On a GPU the kernels or an error, never plain torch in their place.
    backend = {"FBOPT_BACKEND": "kernels"} if choice.device == "cuda" else {}
    status, output = run(command, choice.stage_seconds, os.environ | backend)
    known = {0: "passed", UNAVAILABLE: "not available", None: "stopped: out of time"}
    return {
        "status": known.get(status, f"failed with exit status {status}"),
        "seconds": round(time.monotonic() - start, 1),
        "command": " ".join(["python", *command[1:]]),
        "output": output,
    }


def save(stem: Path, stages: dict[str, Any], facts: dict[str, str]) -> str:
    """Merge stages into the results, write both files, and return the table of stages."""
    path = Path(f"{stem}.json")
    known = json.loads(path.read_text())["stages"] if path.exists() else {}
    stages = {name: (known | stages)[name] for name in STAGES if name in known | stages}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, {"benchmark": "gpu_check", "machine": facts, "stages": stages})
    lines = [["stage", "result", "seconds"]]
    lines += [[name, s["status"], f"{s['seconds']:.0f}"] for name, s in stages.items()]
    text = [f"# GPU check: {facts.get('device', 'a rehearsal without a GPU')}", aligned(lines)]
    text += ["\n".join(f"- {key}: {value}" for key, value in facts.items())]
    for name, s in stages.items():
        text += [f"## {name}", f"    {s['command']}", f"```\n{s['output'].rstrip()}\n```"]
    Path(f"{stem}.md").write_text("\n\n".join(text) + "\n")
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if none failed, 1 if one did, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="three rounds, as a smoke test")
    parser.add_argument("--stage-seconds", type=float, default=540, help="limit for each stage")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    choice = parser.parse_args(argv)
    choice.quick |= choice.device == "cpu"  # results of a rehearsal replace no others
    if unknown := sorted(set(choice.stages) - set(STAGES)):
        parser.error(f"no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    if choice.device == "cuda" and not torch.cuda.is_available():
        why = "sees none" if torch.version.cuda else "is built without CUDA"
        print(NO_GPU.format(torch=torch.__version__, why=why), file=sys.stderr)
        return 2
    facts = gpu_facts(torch.device(choice.device)) | {"torch": torch.__version__}
    name = f"gpu-check-{slug(facts.get('device', 'rehearsal'))}{'-quick' * choice.quick}"
    stages: dict[str, Any] = {}
    for stage in STAGES:
        if not choice.stages or stage in choice.stages:
            print(f"\n== stage {stage}", flush=True)
            stages[stage] = run_stage(stage, choice)
            table = save(choice.out / name, stages, facts)
    print(f"\n{table}\n\nwrote {choice.out / name}.json and .md")
    return int(not all(s["status"] in ("passed", "not available") for s in stages.values()))


if __name__ == "__main__":
    sys.exit(main())
