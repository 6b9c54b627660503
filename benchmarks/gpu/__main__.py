"""Run one stage in this process, and keep what it finds in a JSON file as it goes.

python -m benchmarks.gpu STAGE FILE [options of benchmarks.gpu_check]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import STAGES, Settings, Unavailable

PASSED, FAILED, UNAVAILABLE = "passed", "failed", "not available"


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what a stage takes."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that all works")
    parser.add_argument("--rounds", type=int, help="how often each contender gets its turn")
    parser.add_argument("--images", type=int, help="images of a whole step, by default 50,000")
    every = Settings.precisions
    parser.add_argument("--precisions", nargs="+", choices=every, default=every)
    parser.add_argument("--stage-seconds", type=float, default=540, help="limit for each stage")
    return parser


def settings(choice: argparse.Namespace) -> Settings:
    """What the stage takes, from the command line."""
    return Settings(
        device=choice.device,
        quick=choice.quick,
        seconds=choice.stage_seconds,
        rounds=choice.rounds,
        images=choice.images,
        precisions=tuple(choice.precisions),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; 0 if it passed or is not available, 1 if it failed."""
    parser = options(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("file", type=Path)
    choice = parser.parse_args(argv)
    from benchmarks.report import Report, arguments, write_json

    chosen = settings(choice)
    given = [word for word in arguments(argv) if word != str(choice.file)]
    report = Report("gpu_check", given, chosen.where, path=choice.file)
    start = time.monotonic()
    try:
        importlib.import_module(f"benchmarks.gpu.{choice.stage}").run(report, chosen)
        status, why = PASSED, ""
    except Unavailable as error:
        status, why = UNAVAILABLE, str(error)
    except Exception as error:  # whatever went wrong belongs into the report
        traceback.print_exc()
        status, why = FAILED, f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - start, 1)
    ending = {"status": status, "why": why, "seconds": seconds}
    write_json(choice.file, report.content() | ending)
    print(f"stage {choice.stage}: {status} {why}".strip())
    return 1 if status == FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
