"""An attack: hostile cases, and what holds for each of them. How they are tried, and counted.

FBOPT_FUZZ=N tries N times as many cases, drawn from a seed that `make fuzz` prints (FBOPT_FUZZ_SEED
sets it); without it they are the same every time. Hypothesis shrinks what fails, and keeps it in
.hypothesis, where the next run begins.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TextIO

import torch
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

TIMES = int(os.environ.get("FBOPT_FUZZ", "1"))
SEED = int(os.environ.get("FBOPT_FUZZ_SEED") or random.SystemRandom().randrange(10**6))
RAISED = 70  # the status of a process that an exception has ended
STATUSES = (0, 1, 2, 130, 141)
SECONDS = 300.0  # after which a forked process counts as one that hangs
SHOWN = 4000  # characters of what a failure printed


class Attack(NamedTuple):
    """Cases to draw, a check that raises where one is not survived, and cases that once failed."""

    cases: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    kept: tuple[Any, ...] = ()


def hammer(attack: Attack, cases: int) -> None:
    """Try the kept cases and so many times TIMES others; fails with the smallest that fails."""
    test = given(attack.cases)(attack.check)
    for kept in attack.kept:
        test = example(kept)(test)
    if TIMES > 1:
        test = seed(SEED)(test)
    always = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=cases * TIMES, derandomize=TIMES == 1, **always)(test)()


def survey(attack: Attack, cases: int, number: int) -> tuple[int, int]:
    """Try so many cases, drawn from a seed; returns how many were tried, and how many failed.

    What fails is printed, and stops nothing.
    """
    tried = failed = 0

    def check(case: Any) -> None:
        nonlocal tried, failed
        tried += 1
        try:
            attack.check(case)
        except HypothesisException:
            raise
        except Exception:
            failed += 1
            print(
                f"failed: {case!r}"[:SHOWN], traceback.format_exc()[-SHOWN:], sep="\n", flush=True
            )

    for kept in attack.kept:
        check(kept)
    phases = {"phases": [Phase.generate], "database": None}
    always = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    test = settings(max_examples=cases, **phases, **always)(
        seed(number)(given(attack.cases)(check))
    )
    test()
    return tried, failed


def attempt(work: Callable[[], int]) -> tuple[int, str]:
    """Run a command; fail for anything but a status, with a message where it is an error."""
    out = io.StringIO()
    with (
        in_time(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        warnings.simplefilter("ignore")
        try:
            status = work()
        except SystemExit as stop:
            status = stop.code
    return judged(status, out.getvalue())


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Fail for what takes longer than SECONDS."""

    def late(number: int, frame: Any) -> NoReturn:
        raise AssertionError(f"it hangs: no end after {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judged(status: int, text: str) -> tuple[int, str]:
    """A command's status and what it printed; fails for a traceback, and for a silent error."""
    assert "Traceback" not in text and "Exception ignored" not in text, text[-SHOWN:]
    assert status in STATUSES, f"status {status}: {text[-SHOWN:]}"
    assert status in (0, 130, 141) or text.strip(), f"status {status}, and it says nothing"
    return status, text


def forked(work: Callable[[], int], seconds: float = SECONDS) -> tuple[int, str]:
    """The status of work in a process of its own, and what that printed; -9 after SIGKILL.

    Nothing that it does reaches this process. The first to fork has to compute with one thread.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that only wait
            child = os.fork()
        if not child:
            _run_and_exit(work, output.fileno())
        status = _wait_for(child, seconds)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _run_and_exit(work: Callable[[], int], output: int) -> None:
    status: Any = RAISED
    try:
        os.setpgid(0, 0)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = map(_stream, (1, 2))
        warnings.simplefilter("ignore")
        status = work()
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status if isinstance(status, int) else RAISED)


def _stream(descriptor: int) -> TextIO:
    return io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), "utf-8", "replace")


def _wait_for(child: int, seconds: float) -> int:
    """The status of a process, or the number of the signal that ended it, negative."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # what it has started
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"it hangs: no end after {seconds:g} s")
        time.sleep(0.002)
