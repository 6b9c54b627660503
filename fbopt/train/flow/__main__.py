"""`fbopt flow RUN`: follow a flow beside a run, print it, and write records and a figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from fbopt.train.checkpoint import atomic
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.parser import fail, parse
from fbopt.train.flow.options import FlowOptions, check
from fbopt.train.reporting import plots


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt flow …`; returns 0, 1 (the flow or the run cannot go on, not writable), 2 (bad
    input), 130.
    """
    (options,) = parse("fbopt flow", arguments, FlowOptions)
    try:
        follow(options)
    except (OptionsError, DataError) as error:
        return fail(f"fbopt flow: {error}", 2)
    except (ValueError, RuntimeError, ModuleNotFoundError, plots.NoFigures) as error:
        return fail(f"fbopt flow: {error}", 1)
    except OSError as error:
        return fail(f"fbopt flow: {options.folder}: cannot be written: {atomic.cure(error)}", 1)
    except KeyboardInterrupt:
        return fail("fbopt flow: stopped; nothing was written", 130)
    return 0


def follow(options: FlowOptions) -> list[dict[str, Any]]:
    """Follow the flow that `options` ask for; write and return its records.

    Raises:
        OptionsError, DataError: an invalid option, run or data set.
        ValueError, RuntimeError: the flow or gradient descent cannot go on; nothing is written.
        ModuleNotFoundError: a central flow without clarabel.
        NoFigures: matplotlib cannot be imported; the records are written.
        OSError: the folder cannot be written.
    """
    check(options)
    from fbopt.train.flow.beside import Beside, begin

    run = begin(options.run[0], options.device)
    steps = options.steps or run.options.passes - options.after
    if steps < 1:
        raise OptionsError(f"--after {options.after}: the run has {run.options.passes} steps")
    beside = Beside(run, options.kind, options.substeps, options.margin, options.after)
    records = []
    for record in beside.follow(steps, options.every):
        records.append(record)
        print(_words(record), flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"flow-{options.kind}.jsonl"
    atomic.replace(path, "".join(json.dumps(r) + "\n" for r in records).encode())
    from fbopt.train.flow.draw import draw

    page = draw(records, options.kind)
    with plots.styled():
        plots.save(page, path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png')}", flush=True)
    return records


def _words(record: dict[str, Any]) -> str:
    return (
        f"step {record['step']:>6,}  loss {record['loss']:.4f}, flow {record['flow_loss']:.4f}  "
        f"sharpness {record['sharpness']:.4g}, flow {record['flow_sharpness']:.4g} "
        f"of {record['threshold']:.4g}  apart {record['function_distance']:.3g}"
    )


if __name__ == "__main__":
    sys.exit(main())
