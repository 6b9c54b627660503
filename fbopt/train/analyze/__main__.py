"""`fbopt analyze RUN …`: take each measure, print it, and write results.json and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fbopt.train.analyze.options import Analysis, check
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.parser import fail, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt analyze …`; returns 0, 1 (not measurable), 2 (bad input, not writable), 130."""
    (options,) = parse("fbopt analyze", arguments, Analysis)
    try:
        analyze(options)
    except (OptionsError, DataError) as error:
        return fail(f"fbopt analyze: {error}", 2)
    except (ValueError, RuntimeError) as error:
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
    report = Report(folder_of(options), options, subjects)
    for name in options.measures:
        for subject in subjects:
            work = partial(measures.MEASURES[name], subject, options)
            report.measure(name, subject, work, alone=True)
        report.draw(name)
    if options.between:
        work = partial(measures.between, subjects, options)
        report.measure("between", subjects[0], work, alone=False)
        report.draw("between")
    print(f"written: {report.folder}/ ({', '.join(report.written)})", flush=True)
    return report.results


if __name__ == "__main__":
    sys.exit(main())
