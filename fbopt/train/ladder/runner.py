"""The runs of a ladder, each in a process of its own, several at a time; Ctrl-C saves them all.

The processes are in sessions of their own: a terminal's Ctrl-C reaches only this one, which passes
it on once, so that each of them saves after its step.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.data.load import load
from fbopt.train.ladder.plan import Plan

POLL_SECONDS = 0.2
NEWS_SECONDS = 60.0
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Stopped(Exception):
    """A ladder that was interrupted; `str()` says how to go on."""


def run_all(plan: Plan) -> list[str]:
    """Run what is not finished yet; returns the names of the runs that failed.

    Raises Stopped, and DataError before anything is started.
    """
    left = [o for o in plan.everything if not RunFolder(o.out).result.exists()]
    if left:  # one download, one error for data that cannot be used
        one = left[0]
        load(one.data, one.image_size, one.data_dir, one.download, one.samples)
    total = len(plan.everything)
    print(f"{total} runs, {total - len(left)} of them finished; {plan.jobs} at a time", flush=True)
    with Crew(plan) as crew:
        while (left or crew.at_work) and not (crew.stopping and not crew.at_work):
            while left and len(crew.at_work) < plan.jobs and not crew.stopping:
                crew.start(left.pop(0))
            time.sleep(POLL_SECONDS)
            crew.look_after()
    if crew.stopping:
        raise Stopped(f"stopped, what was running is saved; go on with\n  {plan.command}")
    return crew.failed


class Crew:
    """A context in which runs are at work, and signals are passed on to them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.at_work: dict[subprocess.Popen[bytes], Options] = {}
        self.failed: list[str] = []
        self.stopping = False
        self.done = sum(RunFolder(o.out).result.exists() for o in plan.everything)
        self.news = time.monotonic() + NEWS_SECONDS
        self._signals = ExitStack()

    def __enter__(self) -> Crew:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in SIGNALS:
                self._signals.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.close()
        for process in self.at_work:  # only after an error in this process
            process.terminate()
            process.wait()

    def start(self, options: Options) -> None:
        """Start a run; its output goes to a log."""
        log = self._log(options)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fbopt.train.ladder.worker"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.at_work[process] = options
        process.stdin.write(json.dumps(options.as_json()).encode())
        process.stdin.close()

    def look_after(self) -> None:
        """Say which runs have ended, and now and then how far the others are."""
        for process in [p for p in self.at_work if p.poll() is not None]:
            self._ended(self.at_work.pop(process), process.returncode)
        if self.at_work and time.monotonic() > self.news:
            self.news = time.monotonic() + NEWS_SECONDS
            print(f"  {', '.join(map(_progress, self.at_work.values()))}", flush=True)

    def _ended(self, options: Options, status: int) -> None:
        folder, name = RunFolder(options.out), f"{options.recipe}, seed {options.seed}"
        if folder.result.exists():
            result = folder.read_result()
            self.done += 1
            print(
                f"{name}: test accuracy {result['test_accuracy']:.2%}, {result['seconds']:.0f} s "
                f"({self.done} of {len(self.plan.everything)} runs)",
                flush=True,
            )
        elif not self.stopping:
            self.failed.append(name)
            print(f"{name}: {self._reason(options, status)}", file=sys.stderr, flush=True)

    def _reason(self, options: Options, status: int) -> str:
        log = self._log(options)
        if status == 130:  # a signal that did not come from here
            return f"interrupted; the same command goes on with it (see {log})"
        lines = log.read_text(errors="replace").strip().splitlines()
        words = lines[-1].removeprefix("fbopt train: ") if lines else f"exit status {status}"
        return f"failed: {words} (see {log})"

    def _log(self, options: Options) -> Path:
        return self.plan.folder / "logs" / f"{options.out.name}.log"

    def _handle(self, number: int, frame: Any) -> None:
        again = "" if self.stopping else " (again to stop at once, without it)"
        print(f"\nstopping after the step of every run{again}", flush=True)
        self.stopping = True
        for process in self.at_work:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)


def _progress(options: Options) -> str:
    records = atomic.read_lines(RunFolder(options.out).metrics)
    return f"{options.recipe} s{options.seed} at pass {records[-1]['pass'] if records else 0}"
