"""`fbopt compare`: train several recipes with several seeds and print one table of the results.

The numbers are test accuracies after the last pass (never the best on the way), mean ± sample
standard deviation over the seeds. Finished runs are read again, interrupted ones go on.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fbopt.train.launch import launched, leads, parse_once
from fbopt.train.options import Options, OptionsError, RecipeName, resolve
from fbopt.train.sources import DataError


@dataclass(frozen=True)
class Comparison:
    """Train each recipe with seeds 0 … seeds − 1 and print a Markdown table."""

    data: str = "mnist1d"
    """Data set, as for `fbopt train`."""
    recipes: tuple[RecipeName, ...] = ("sgd", "fb", "fb-penalty")
    """Rows of the table."""
    seeds: int = 3
    """Runs per recipe."""
    runs: Path = Path("runs")
    """Folder that the run folders lie in."""
    threads: int | None = None
    """Threads that torch computes with, as for `fbopt train`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt compare …`; returns 0, 1 (diverged, disk full), 2 (bad input) or 130."""
    import tyro

    wanted = parse_once(lambda: tyro.cli(Comparison, prog="fbopt compare", args=arguments))
    if launched()[1] > 1:
        if leads():
            print(
                "fbopt compare: runs in one process, as its SGD does; start it without torchrun, "
                "or `fbopt train` with it",
                file=sys.stderr,
            )
        return 2
    from fbopt.train.files import WriteError
    from fbopt.train.interrupt import Interrupted
    from fbopt.train.run import Diverged

    try:
        print(compare(wanted))
    except (OptionsError, DataError, Diverged, WriteError) as error:
        print(f"fbopt compare: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionsError | DataError) else 1
    except Interrupted as stop:
        print(f"{stop}\nor give the same command again", flush=True)
        return 130
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        return 130
    return 0


def compare(wanted: Comparison) -> str:
    """Train what is not trained yet; returns the table."""
    if wanted.seeds < 1:
        raise OptionsError(f"--seeds {wanted.seeds}: has to be at least 1")
    rows = [
        "| recipe | test accuracy (%) | train loss | steps | passes of gradients |",
        "|---|---|---|---|---|",
    ]
    for recipe in wanted.recipes:
        results = [_result(wanted, recipe, seed) for seed in range(wanted.seeds)]
        first = results[0]
        cells = (
            recipe,
            _spread([100 * r["test_accuracy"] for r in results], 2),
            _spread([r["loss"] for r in results], 4),
            f"{first['step']:,}",
            f"{first['gradient_evaluations']:,}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _result(wanted: Comparison, recipe: str, seed: int) -> dict:
    from fbopt.train.loop import train
    from fbopt.train.match import check_options
    from fbopt.train.store import RunFolder

    options = Options(data=wanted.data, recipe=recipe, seed=seed, threads=wanted.threads)
    folder = RunFolder(wanted.runs / options.folder.name)
    options = replace(options, out=folder.path, resume="auto")
    if folder.result.exists():
        check_options(str(folder.path), folder.read_options() or {}, resolve(options))
        return folder.read_result()
    return train(options).summary


def _spread(values: list[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


if __name__ == "__main__":
    sys.exit(main())
