"""The rank that torchrun gives a process, and which rank prints. Imports no torch.

Help and mistyped options should not wait for torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from fbopt.train.config.options import OptionsError


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without torchrun.

    Raises OptionsError for what torchrun never sets.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(word.isdecimal() and len(word) < 10 for word in given) or int(given[0]) >= int(
        given[1]
    ):
        raise OptionsError(
            f"RANK is {given[0]!r} and WORLD_SIZE {given[1]!r}, but TORCHELASTIC_RUN_ID is set, as "
            "torchrun sets it; unset it, or start the job with torchrun"
        )
    return int(given[0]), int(given[1])


def is_rank_zero() -> bool:
    """Whether this process is the one that prints."""
    return rank_and_world_size()[0] == 0


@contextlib.contextmanager
def only_rank_zero_prints(errors: bool = False) -> Iterator[None]:
    """Silence stdout, and with `errors` stderr too, on ranks other than 0."""
    with contextlib.ExitStack() as stack:
        if not is_rank_zero():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            if errors:
                stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def exit_with(work: Callable[[], int]) -> int:
    """Return the exit status of `work`; a process of torchrun's exits with it instead."""
    if rank_and_world_size()[1] == 1:
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
