"""`python -m fbopt.train.ladder`, the same as `fbopt ladder`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import fail, parse
from fbopt.train.ladder.plan import Ladder, make_plan
from fbopt.train.output import CLOSED_PIPE, guarded
from fbopt.train.torchrun import only_rank_zero_prints, rank_and_world_size

INTERRUPTED = 130
NOTES = "All other options of `fbopt train` hold for every row; `fbopt train --help` lists them."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt ladder …`; returns 0, 1 (a run failed), 2 (bad input) or 130 (stopped before the
    end, by a signal or --minutes).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with only_rank_zero_prints(errors=True):
        wanted, common = parse("fbopt ladder", words, Ladder, Options, notes=NOTES)
        if rank_and_world_size()[1] > 1:
            cure = "start it without torchrun, or `fbopt train` with it"
            return fail(f"fbopt ladder: starts its own processes; {cure}", 2)
    command = shlex.join(["fbopt", "ladder", *words])
    with guarded() as output:
        status = _run(wanted, common, command)
    return CLOSED_PIPE if output.pipe_is_closed else status


def _run(wanted: Ladder, common: Options, command: str) -> int:
    try:
        plan = make_plan(wanted, common, command)
        from fbopt.train.ladder import runner, summary  # the time of --minutes runs meanwhile

        status = runner.run_all(plan)
        print(summary.write(plan))
        if status == INTERRUPTED:
            print(f"stopped, what was running is saved; go on with\n  {plan.command}")
        return status
    except (OptionsError, DataError) as error:
        return fail(f"fbopt ladder: {error}", 2)
    except OSError as error:
        return fail(f"fbopt ladder: {error}; check the disk, then give the same command again", 1)


if __name__ == "__main__":
    sys.exit(main())
