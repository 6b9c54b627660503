"""`fbopt plot RUNS …`: read metrics of several runs, draw them over each other, write a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fbopt.train.checkpoint import atomic
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.parser import fail, parse
from fbopt.train.plot.draw import draw
from fbopt.train.plot.options import Plot, check
from fbopt.train.plot.read import read
from fbopt.train.reporting import plots


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt plot …`; returns 0, 1 (not writable, no matplotlib), 2 (bad input), 130."""
    (options,) = parse("fbopt plot", arguments, Plot)
    try:
        plot(options)
    except (OptionsError, DataError) as error:
        return fail(f"fbopt plot: {error}", 2)
    except (atomic.WriteError, plots.NoFigures) as error:
        return fail(f"fbopt plot: {error}", 1)
    except KeyboardInterrupt:
        return fail("fbopt plot: stopped; nothing was written", 130)
    return 0


def plot(options: Plot) -> None:
    """Draw the figure that `options` ask for into their file.

    Raises:
        OptionsError: an invalid option or run; nothing is written.
        WriteError: the file cannot be written; one that was there is as it was.
        NoFigures: matplotlib cannot be imported.
    """
    check(options)
    page = draw(options, read(options))
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with plots.styled():
            plots.save(page, options.out)
    except OSError as error:
        raise atomic.WriteError(
            f"--out {options.out}: cannot be written ({error.strerror or error}); "
            f"{atomic.cure(error)}, or give another --out"
        ) from error
    print(f"written: {options.out}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
