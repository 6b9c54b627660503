"""`fbopt analyze RUN …`: measure, print a line, write results.json and figures, one by one."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fbopt.train.analyze.options import Analysis, as_json, check
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.parser import parse

if TYPE_CHECKING:
    from fbopt.train.analyze.runs import Subject


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt analyze …`; returns 0, 1 (cannot be measured or written), 2 (bad input) or 130."""
    (options,) = parse("fbopt analyze", arguments, Analysis)
    from fbopt.train.checkpoint.atomic import WriteError

    try:
        analyze(options)
    except (OptionsError, DataError) as error:
        return _fail(str(error), 2)
    except (ValueError, RuntimeError, WriteError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail(f"stopped; what was finished is in {folder_of(options)}/", 130)
    return 0


def folder_of(options: Analysis) -> Path:
    """Where results go: `out`, RUN/analysis, or analysis-NAME-NAME beside the first of several."""
    if options.out is not None:
        return options.out
    folders = [path if path.is_dir() else path.parent for path in options.runs]
    if len(folders) == 1:
        return folders[0] / "analysis"
    names = [path.resolve().name for path in folders]
    return folders[0].resolve().parent / "-".join(["analysis", *names])


def analyze(options: Analysis) -> dict[str, Any]:
    """Measure as `options` say; write and return what is in results.json.

    Raises:
        OptionsError, DataError: something cannot work; nothing is written.
        ValueError, RuntimeError: weights or a loss that cannot be measured; what was finished is
            kept.
    """
    check(options)
    from fbopt.train.analyze.measures import MEASURES, between, passes
    from fbopt.train.analyze.report import Report
    from fbopt.train.analyze.runs import read

    subjects = [read(path, options) for path in options.runs]
    report = Report(folder_of(options), as_json(options))
    for subject in subjects:
        report.add_run(subject, subject.pass_seconds(options.train_steps))
    for name in options.measures:
        for subject in subjects:
            measure = MEASURES[name]
            work = _call(measure, subject, options)
            values, text = _measured(report, subject, name, passes(name, [subject], options), work)
            report.add(subject.name, name, values)
            print(f"{subject.name}: {name}: {text}\n    {_cost(values['cost'])}", flush=True)
        report.draw(name)
    if options.between:
        work = _call(between, subjects, options)
        total = passes("between", subjects, options)
        values, text = _measured(report, subjects[0], "between", total, work)
        report.add_between(values)
        print(f"between the runs: {text}\n    {_cost(values['cost'])}", flush=True)
        report.draw("between")
    print(f"written: {report.folder}/ ({', '.join(report.written)})", flush=True)
    return report.results


Work = Callable[[], tuple[dict[str, Any], str]]


def _call(function: Callable[..., Any], *arguments: Any) -> Work:
    return lambda: function(*arguments)


def _measured(
    report: Any, subject: Subject, name: str, total: int | None, work: Work
) -> tuple[dict[str, Any], str]:
    """The values and text of a measure, with its cost, under a progress bar."""
    objective = subject.objective
    before, start = objective.cost.copy(), time.perf_counter()
    with _bar(f"{name}, {subject.name}", total) as bar:
        objective.on_pass = bar.update
        try:
            values, text = work()
        finally:
            objective.on_pass = lambda: None
    seconds = time.perf_counter() - start
    cost = vars(objective.cost.since(before)) | {
        "seconds": round(seconds, 3),
        "training_passes": round(seconds / report.pass_seconds(subject.name), 2),
    }
    return values | {"cost": cost}, text


def _bar(description: str, total: int | None) -> Any:
    """A bar on a terminal that counts passes over the training set; nothing elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        from fbopt.train.analyze.report import NoBar

        return NoBar()
    return tqdm(
        total=total,
        desc=description,
        unit="pass",
        leave=False,
        disable=None,
        ncols=shutil.get_terminal_size().columns,
        nrows=20,  # tqdm shows nothing where a pseudo-terminal claims to have no rows
    )


def _cost(cost: dict[str, Any]) -> str:
    return (
        f"{cost['gradients']} gradients, {cost['second_backwards']} second backward passes, "
        f"{cost['losses']} losses; {cost['seconds']:.1f} s, as long as "
        f"{cost['training_passes']:.1f} passes of training"
    )


def _fail(message: str, status: int) -> int:
    print(f"fbopt analyze: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
