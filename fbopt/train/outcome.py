"""What a run came to: its exit status, and the message for what went wrong."""

from __future__ import annotations

from collections.abc import Callable

from fbopt._build.compiler import BuildError
from fbopt._distributed import PeerError
from fbopt.train.agreement import ProcessesDiffer
from fbopt.train.checkpoint.atomic import WriteError
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.parser import fail
from fbopt.train.distributed import peer_error_status
from fbopt.train.signals import Interrupted
from fbopt.train.torchrun import is_rank_zero
from fbopt.train.trainer import Diverged

AT_ONCE = "stopped at once"
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
LESS = "give a smaller --chunk-size or --batch-size, --width or --samples; what was saved is kept"


def status_of(work: Callable[[], int]) -> int:
    """Return what `work` returns, or print what went wrong and return the status for it."""
    prints = is_rank_zero()  # errors that all ranks raise alike are printed by rank 0 alone
    try:
        return work()
    except (OptionsError, DataError, BuildError) as error:
        return fail(f"fbopt train: {error}", 2)
    except (Diverged, WriteError, ProcessesDiffer) as error:
        return fail(f"fbopt train: {error}" if prints else "", 1)
    except PeerError as error:
        return peer_error_status(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return fail(f"fbopt train: {_line(error)}; {LESS}", 1)
    except Interrupted as stop:
        if prints:
            print(stop, flush=True)
        return 130
    except KeyboardInterrupt:
        return fail(AT_ONCE if prints else "", 130)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has an error for it on GPUs, and words for it on the CPU."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool({"MemoryError", "OutOfMemoryError"} & names) or NO_MEMORY in str(error)


def _line(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"out of memory ({said})" if said else "out of memory"
