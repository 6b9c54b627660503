"""What torchrun tells a process about the others; needs no torch, for a typing error should not."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def launched() -> tuple[int, int]:
    """The rank and number of processes that torchrun has given this one; (0, 1) without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def leads() -> bool:
    """Whether this process is the one that prints."""
    return launched()[0] == 0


@contextlib.contextmanager
def only_lead_prints(errors: bool = False) -> Iterator[None]:
    """Let what other processes print, on stdout and for `errors` on stderr too, be nowhere seen."""
    with contextlib.ExitStack() as stack:
        if not leads():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            if errors:
                stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def exit_with(work: Callable[[], int]) -> int:
    """The exit status that `work` returns; one of several processes ends with it, here."""
    if launched()[1] == 1:
        return work()
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # torch aborts now and then when the interpreter ends before a process group does: "terminate
    # called without an active exception" (2.14), in place of the status.
    os._exit(status)


def parse_once(parse: Callable[[], T]) -> T:
    """Let a parser, which all processes call, print its help or its errors on rank 0 alone."""
    with only_lead_prints(errors=True):
        return parse()
