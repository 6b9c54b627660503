"""Whatever a run may wait for, for ever: each has a limit, says what it waits for, and ends.

    python -m tests.hostile hangs              two minutes, with limits of seconds
    python -m tests.hostile hangs "stopped"    those whose names have these letters

Each trial is a process that waits for something that never comes; it has to end by itself, with the
words that are expected, and without a traceback.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.hostile import hanging_builds, hanging_pipes, hanging_ranks, hanging_rest  # noqa: F401
from tests.hostile.tables import Row, show
from tests.hostile.trials import LONGEST, TRIALS, Program, Started, Trial, write_data

HEADER = ("cause", "limit", "said meanwhile", "after", "how it ended")


def run(one: Trial, folder: Path) -> Row:
    """Start the programs of a trial, and judge how the last of them ends."""
    folder.mkdir()
    write_data(folder)
    programs: list[Program] = []
    try:
        programs.extend(_each(one.start(folder), programs))
        judged = programs[-1]
        begin = time.monotonic()
        try:
            status = judged.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            status = None
        seconds, said = time.monotonic() - begin, judged.said()
    finally:
        for program in programs:
            program.kill()
    found = [re.search(pattern, said) for pattern in (one.meanwhile, one.end)]
    own = said.partition("torch/distributed/elastic/multiprocessing/api.py")[0]  # torchrun has one
    statuses = (one.status,) if isinstance(one.status, int) else one.status
    holds = status in statuses and all(found) and "Traceback" not in own
    for where in (f"{folder}/", f"{sys.prefix}/bin/", "/__w/pytorch/pytorch/"):  # torch's build
        said = said.replace(where, "")
    meanwhile, end = (_line(said, re.search(p, said)) for p in (one.meanwhile, one.end))
    ended = "HANGS" if status is None else f"status {status}"
    if not holds:
        ended += f", but expected {one.status}; {said[-2000:]}"
    return Row((one.cause, one.limit, meanwhile, f"{seconds:.0f} s", f"{end} ({ended})"), holds)


def _each(started: Started, programs: list[Program]) -> Iterator[Program]:
    """The programs, in `programs` as soon as they are there, for those that have to be killed."""
    for program in started:
        programs.append(program)
    yield from ()


def _line(said: str, match: re.Match[str] | None) -> str:
    """The line that has the words."""
    if match is None or match.start() == match.end():
        return "–"
    line = said[said.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0].strip()
    return line if len(line) <= 200 else f"{line[:200]}…"


def main(names: Sequence[str] = ()) -> tuple[list[Row], str]:
    """Run the trials, or those whose names have the words of one of `names`."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fbopt-hangs-") as folder:
        for number, one in enumerate(TRIALS):
            if not names or any(name in one.cause for name in names):
                try:
                    rows.append(run(one, Path(folder, f"{number}")))
                except RuntimeError as error:
                    rows.append(
                        Row((one.cause, one.limit, "–", "–", f"did not start: {error}"), False)
                    )
                show(rows[-1])
    return rows, ""
