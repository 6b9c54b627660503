"""`python -m fbopt.train`, the same as `fbopt train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fbopt.train.config.options import Options
from fbopt.train.config.parser import fail, parse
from fbopt.train.config.recipes import overview
from fbopt.train.config.sweep import NOTES, Sweep
from fbopt.train.output import CLOSED_PIPE, guarded, until_closed
from fbopt.train.torchrun import exit_with, is_rank_zero, only_rank_zero_prints

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return 0, 1 (diverged, disk full), 2 (bad input), 130 or 141.

    The last two are for runs that were saved and stopped: by a signal, by a closed pipe.
    """
    with only_rank_zero_prints(errors=True):
        notes = f"{overview()}\n\n{NOTES}"
        options, sweep = parse("fbopt train", arguments, Options, Sweep, notes=notes)
    return exit_with(lambda: run(options, sweep))


def run(options: Options, sweep: Sweep | None = None) -> int:
    """Train, print what went wrong, if anything, and return the exit status."""
    from fbopt._build.load import requested_backend
    from fbopt.train.ensemble.start import start_many
    from fbopt.train.launch import start
    from fbopt.train.malloc import keep_freed
    from fbopt.train.outcome import status_of
    from fbopt.train.parent import end_with_ladder

    keep_freed()
    try:
        end_with_ladder()
        requested_backend()
    except ValueError as error:  # a mistyped variable
        return fail(f"fbopt train: {error}" if is_rank_zero() else "", 2)
    with guarded() as output:
        if sweep is not None and sweep.is_given:
            status = status_of(lambda: start_many(sweep.expand(options)))
        else:
            status = status_of(lambda: start(options))
    return CLOSED_PIPE if output.pipe_is_closed and status == INTERRUPTED else status


if __name__ == "__main__":
    sys.exit(until_closed(main))
