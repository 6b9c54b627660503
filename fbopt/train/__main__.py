"""`python -m fbopt.train`, the same as `fbopt train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import fail, parse, until_closed
from fbopt.train.config.recipes import overview
from fbopt.train.torchrun import exit_with, is_rank_zero, only_rank_zero_prints


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return 0, 1 (diverged, disk full), 2 (bad input) or 130."""
    with only_rank_zero_prints(errors=True):
        (options,) = parse("fbopt train", arguments, Options, notes=overview())
    return exit_with(lambda: run(options))


def run(options: Options) -> int:
    """Train, print what went wrong, if anything, and return the exit status."""
    from fbopt._build.compiler import BuildError
    from fbopt._build.load import requested_backend
    from fbopt._distributed import PeerError
    from fbopt.train.checkpoint.atomic import WriteError
    from fbopt.train.distributed import peer_error_status
    from fbopt.train.loop import train
    from fbopt.train.malloc import keep_freed
    from fbopt.train.signals import Interrupted
    from fbopt.train.trainer import Diverged

    prints = is_rank_zero()  # errors that all ranks raise alike are printed by rank 0 alone
    keep_freed()
    try:
        requested_backend()
    except ValueError as error:  # a mistyped FBOPT_BACKEND
        return fail(f"fbopt train: {error}" if prints else "", 2)
    try:
        train(options)
    except (OptionsError, DataError, BuildError) as error:
        return fail(f"fbopt train: {error}", 2)
    except (Diverged, WriteError) as error:
        return fail(f"fbopt train: {error}" if prints else "", 1)
    except PeerError as error:
        return peer_error_status(error)
    except Interrupted as stop:
        if prints:
            print(stop, flush=True)
        return 130
    except KeyboardInterrupt:
        return fail("stopped at once" if prints else "", 130)
    return 0


if __name__ == "__main__":
    sys.exit(until_closed(main))
