"""`fbopt analyze RUN …`: take each measure, print it, and write results.json and figures."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fbopt.train.analyze.options import Analysis, as_json, check
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.parser import fail, parse

if TYPE_CHECKING:
    from fbopt.train.analyze.report import Report
    from fbopt.train.analyze.runs import Subject


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt analyze …`; returns 0, 1 (cannot be measured or written), 2 (bad input) or 130."""
    (options,) = parse("fbopt analyze", arguments, Analysis)
    from fbopt.train.checkpoint.atomic import WriteError

    try:
        analyze(options)
    except (OptionsError, DataError) as error:
        return fail(f"fbopt analyze: {error}", 2)
    except (ValueError, RuntimeError, WriteError) as error:
        return fail(f"fbopt analyze: {error}", 1)
    except KeyboardInterrupt:
        return fail(f"fbopt analyze: stopped; what was finished is in {folder_of(options)}/", 130)
    return 0


def folder_of(options: Analysis) -> Path:
    """The output folder: `out`, RUN/analysis, or analysis-NAME-NAME beside the first of several."""
    if options.out is not None:
        return options.out
    folders = [path if path.is_dir() else path.parent for path in options.runs]
    if len(folders) == 1:
        return folders[0] / "analysis"
    names = [path.resolve().name for path in folders]
    return folders[0].resolve().parent / "-".join(["analysis", *names])


def analyze(options: Analysis) -> dict[str, Any]:
    """Measure as `options` say; write and return the content of results.json.

    Raises:
        OptionsError, DataError: an invalid option, run or data set; nothing is measured.
        ValueError, RuntimeError: weights or a loss that cannot be measured; finished measures are
            kept.
    """
    check(options)
    from fbopt.train.analyze import measures
    from fbopt.train.analyze.report import Report
    from fbopt.train.analyze.runs import read

    subjects = [read(path, options) for path in options.runs]
    report = Report(folder_of(options), as_json(options))
    for subject in subjects:
        report.add_run(subject, subject.pass_seconds(options.train_steps))
    for name in options.measures:
        for subject in subjects:
            work = partial(measures.MEASURES[name], subject, options)
            values = _measure(report, f"{subject.name}: {name}", subject, name, options, work)
            report.add(name, values, subject.name)
        report.draw(name)
    if options.between:
        name = "line" if len(subjects) == 2 else "plane"
        work = partial(measures.between, subjects, options)
        values = _measure(report, "between the runs", subjects[0], name, options, work)
        report.add("between", values)
        report.draw("between")
    print(f"written: {report.folder}/ ({', '.join(report.written)})", flush=True)
    return report.results


def _measure(
    report: Report,
    title: str,
    subject: Subject,
    name: str,
    options: Analysis,
    work: Callable[[], tuple[dict[str, Any], str]],
) -> dict[str, Any]:
    """Do the work under a progress bar, print its text, and return its values with their cost."""
    from fbopt.train.analyze.measures import passes

    objective = subject.objective
    before, start = objective.cost.copy(), time.perf_counter()
    subject.set_precision()
    with _progress_bar(title, passes(name, subject, options)) as advance:
        objective.on_pass = advance
        try:
            values, text = work()
        finally:
            objective.on_pass = lambda: None
    seconds = time.perf_counter() - start
    training_passes = round(seconds / report.pass_seconds(subject.name), 2)
    cost = vars(objective.cost.since(before))
    print(
        f"{title}: {text}\n    {cost['gradients']} gradients, {cost['second_backwards']} second "
        f"backward passes, {cost['losses']} losses; {seconds:.1f} s, as long as "
        f"{training_passes:.1f} passes of training",
        flush=True,
    )
    timing = {"seconds": round(seconds, 3), "training_passes": training_passes}
    return values | {"cost": cost | timing}


@contextlib.contextmanager
def _progress_bar(title: str, total: int | None) -> Iterator[Callable[[], object]]:
    """Show a bar on a terminal, where tqdm is installed; yields what advances it by one pass."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    width = shutil.get_terminal_size().columns
    # Without nrows tqdm shows nothing where a pseudo-terminal claims to have no rows.
    with tqdm(
        total=total, desc=title, unit="pass", leave=False, disable=None, ncols=width, nrows=20
    ) as bar:
        yield bar.update


if __name__ == "__main__":
    sys.exit(main())
