"""Train the runs of a ladder, each in its own `fbopt train` process, several at a time.

The processes have sessions of their own: a terminal's Ctrl-C reaches only this one, which passes it
on once, so that each of them saves after its step.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fbopt.train.checkpoint.run_dir import RunFolder, accuracies
from fbopt.train.config.diff import check_options, resolve_for
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import command_line
from fbopt.train.data.load import load_for
from fbopt.train.distributed import MINUTES
from fbopt.train.heartbeat import LATE_SHARE, SILENT_SECONDS
from fbopt.train.ladder.activity import Activity
from fbopt.train.ladder.plan import Plan
from fbopt.train.ladder.speed import measure
from fbopt.train.output import nobody_reads
from fbopt.train.parent import VARIABLE

POLL_SECONDS = 0.1
NEWS_SECONDS = 60.0
KILL_SECONDS = 10.0  # after a second signal, what has not ended
LOOKS = 20  # for signs of life, before a run is ended
MEASURED_STEPS = 20  # before the speed of a run is told
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_all(plan: Plan) -> int:
    """Train what is not finished yet; returns 0, 1 (a run failed) or 130 (stopped before the end,
    by a signal or at the plan's deadline).

    Raises OptionsError (other options made a run that is there) and DataError, before any start.
    """
    for options in plan.last_row_first:
        if (made := RunFolder(options.out).read_options()) is not None:
            check_options(f"the run in {options.out}", made, resolve_for(made, options))
    left = [o for o in plan.last_row_first if not RunFolder(o.out).result.exists()]
    for one in left[:1]:  # one download, one error for data that cannot be used
        load_for(one)
    return Runner(plan, left).run()


class Runner:
    """The processes that train the runs of a plan."""

    def __init__(self, plan: Plan, left: list[Options]) -> None:
        self.plan, self.left, self.total = plan, left, len(plan.last_row_first)
        self.done = self.total - len(left)
        self.running: dict[subprocess.Popen[bytes], Options] = {}
        # Of runs whose speed is not told yet: when their start was recorded before, and their step.
        self.untold: dict[subprocess.Popen[bytes], tuple[int, int]] = {}
        self.activities: dict[subprocess.Popen[bytes], Activity] = {}
        self.next_look, self.quiet = 0.0, set()  # of runs that compute nothing
        self.hung: set[subprocess.Popen[bytes]] = set()  # those that were ended for it
        self.failed = self.stopping = False
        self.end_at = math.inf  # by time.monotonic(), after a second signal

    def run(self) -> int:
        """Train what is left, several at a time, and print each result; returns as `run_all`."""
        finished = f"{self.done} of them finished"
        print(
            f"{self.total} run{'s' * (self.total != 1)}, {finished}; {self.plan.jobs} at a time",
            flush=True,
        )
        handlers = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            self._train()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for process in self.running:  # only after an error in this process
                process.terminate()
                process.wait()
        in_time = time.monotonic() <= self.plan.deadline  # so it was a signal that stopped it
        if self.stopping and (in_time or self.done < self.total):
            return 130
        return int(self.failed)

    def _train(self) -> None:
        news = time.monotonic() + NEWS_SECONDS
        while self.running or (self.left and not self.stopping):
            self._stop_in_time()
            self._look_for_life()
            if nobody_reads() and not self.stopping:
                self._stop()
            while self.left and len(self.running) < self.plan.jobs and not self.stopping:
                self.start(self.left.pop(0))
            time.sleep(POLL_SECONDS)
            for process in [p for p in self.running if p.poll() is not None]:
                self.untold.pop(process, None)
                self.activities.pop(process)
                self._report(self.running.pop(process), process)
            self._tell_speeds()
            if self.running and time.monotonic() > news:
                news += NEWS_SECONDS
                print(f"  {', '.join(map(_progress, self.running.values()))}", flush=True)

    def start(self, options: Options) -> None:
        """Start a run; its output goes to a log."""
        log = self._log(options)
        log.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "fbopt.train", *command_line(options)]
        streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        streams["env"] = os.environ | {VARIABLE: str(os.getpid())}
        log.unlink(missing_ok=True)
        with open(log, "wb") as output:
            before = _recorded(options), _saved_step(options)
            process = subprocess.Popen(words, stdout=output, start_new_session=True, **streams)
        self.running[process], self.untold[process] = options, before
        self.activities[process] = Activity(process.pid)

    def _tell_speeds(self) -> None:
        """Print the speed of each run once it has taken some steps."""
        for process, (recorded, step) in list(self.untold.items()):
            options = self.running[process]
            if _recorded(options) <= recorded:  # what is there was logged before, maybe elsewhere
                continue
            speed = measure(options, step)
            if speed is not None and speed.steps >= MEASURED_STEPS:
                del self.untold[process]
                print(f"{options.recipe}, seed {options.seed}: {speed}", flush=True)

    def _report(self, options: Options, process: subprocess.Popen[bytes]) -> None:
        """Print how a run ended."""
        name, folder = f"{options.recipe}, seed {options.seed}", RunFolder(options.out)
        if folder.result.exists():
            self.done += 1
            try:
                result = folder.read_result()
            except OptionsError as error:  # of this run alone: the others go on
                self.failed = True
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                return
            words = f"{accuracies(result)}, {result['seconds']:.0f} s"
            print(f"{name}: {words} ({self.done} of {self.total} runs)", flush=True)
        elif not self.stopping:
            self.failed = True
            log = self._log(options)
            status = process.returncode
            lines = log.read_text(errors="replace").strip().splitlines() or [f"status {status}"]
            reason = f"failed: {lines[-1].removeprefix('fbopt train: ')}"
            if status in (130, -signal.SIGINT):  # a signal that did not come from here
                reason = "interrupted; the same command goes on with it"
            if process in self.hung:
                what = f"ended, as it had computed nothing for {_minutes(options):g} minutes"
                reason = f"{what}; the same command goes on with it"
            print(f"{name}: {reason} (see {log})", file=sys.stderr, flush=True)

    def _log(self, options: Options) -> Path:
        return self.plan.folder / "logs" / f"{options.out.name}.log"

    def _stop_in_time(self) -> None:
        """Stop at the plan's deadline; once its grace is over, end what has not saved by then."""
        late = time.monotonic() - self.plan.deadline
        if late > 0 and not self.stopping:
            print("\nthe time is over", end="", flush=True)
            self._stop()
        if late > self.plan.grace and self.running:
            print("ending what is still in a step, back at its last save", flush=True)
            for process in self.running:
                _kill(process)
                process.wait()
        if time.monotonic() > self.end_at and self.running:
            self.end_at = math.inf
            print("ending what has not stopped, back at its last save", flush=True)
            for process in self.running:
                _kill(process)

    def _look_for_life(self) -> None:
        """Tell of runs that compute nothing; end those that have not for --timeout minutes."""
        if time.monotonic() < self.next_look or not self.running:
            return
        most = 60 * min(map(_minutes, self.running.values()))
        self.next_look = time.monotonic() + min(SILENT_SECONDS, most / LOOKS)
        for process, options in self.running.items():
            limit, idle = 60 * _minutes(options), self.activities[process].idle_seconds()
            if idle > limit and process not in self.hung:
                self.hung.add(process)
                _kill(process)
            elif idle > LATE_SHARE * limit and process not in self.quiet:
                self.quiet.add(process)
                name = f"{options.recipe}, seed {options.seed} (process {process.pid})"
                what = f"has computed nothing for {idle:.0f} s"
                most = f"it is waited for at most {_minutes(options):g} minutes"
                print(f"{name} {what}; {most}", file=sys.stderr, flush=True)
            elif not idle:
                self.quiet.discard(process)

    def _stop(self, number: int = 0, frame: Any = None) -> None:
        """Make every run save after its step; the second time, stop at once."""
        again = "" if self.stopping else " (again to stop at once, without it)"
        print(f"\nstopping after the step of every run{again}", flush=True)
        self.end_at = time.monotonic() + KILL_SECONDS if self.stopping else math.inf
        self.stopping = True
        for process in self.running:
            process.send_signal(signal.SIGINT)


def _minutes(options: Options) -> float:
    """For how long a run may compute nothing."""
    return options.timeout or MINUTES


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a run with what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has just ended
        os.killpg(process.pid, signal.SIGKILL)


def _recorded(options: Options) -> int:
    """When the last start of a run was recorded, in ns; 0 if it was never."""
    path = RunFolder(options.out).environment
    return path.stat().st_mtime_ns if path.exists() else 0


def _saved_step(options: Options) -> int:
    return max((step for step, _ in RunFolder(options.out).checkpoints()), default=0)


def _progress(options: Options) -> str:
    records = RunFolder(options.out).read_metrics()
    return f"{options.recipe} s{options.seed} at pass {records[-1]['pass'] if records else 0}"
