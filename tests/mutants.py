"""Mutation testing: faults put into the public modules, one at a time; which do the tests not see?

    python tests/mutants.py                       all mutants that are not in the results yet
    python tests/mutants.py --module clip --sample 50
    python tests/mutants.py --again               those that survived, after tests were added
    python tests/mutants.py --report              the table and the survivors, without a run

Works on a copy, in ``mutants/``. One run under coverage says which tests reach which lines; then
each mutant is tested by a process forked from one that has imported torch and pytest alone, with
the tests that reach its statement, shortest first. Results go to ``mutants/results.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutant_source import MODULES, ROOT, Mutant, mutants
from mutant_tests import BUDGET, COPY, Reached, prepare, run

RESULTS = COPY / "results.jsonl"
KILLED = ("killed", "timeout")
MISSED = ("survived", "untested")


def main(arguments: Sequence[str] | None = None) -> int:
    """Test what was asked for, then print the table; return the exit status."""
    options = _options(arguments)
    if not options.report:
        prepare()
        _test_all(options)
    report(_results(), options.module or MODULES)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", action="append", choices=MODULES, help="may be repeated")
    parser.add_argument("--sample", type=int, help="at most so many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the order, and so of the sample")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of tests per mutant")
    parser.add_argument("--again", action="store_true", help="those that were not killed, anew")
    parser.add_argument("--files", nargs="+", default=[], help="all tests of these files instead")
    parser.add_argument("--report", action="store_true", help="print the results alone")
    return parser.parse_args(arguments)


def _test_all(options: argparse.Namespace) -> None:
    reached = None if options.files else Reached()
    waiting = _waiting(options)
    for name in sorted({mutant.module for mutant in waiting}):
        control = Mutant(name, (0, 0), (ROOT / name).read_text(), "")
        if _test(control, reached, options)["end"] != "survived":
            raise SystemExit(f"{name}: the tests fail without a fault, see mutants/output.txt")
    for number, mutant in enumerate(waiting, start=1):
        result = _test(mutant, reached, options)
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        place = f"{mutant.module}:{mutant.lines[0]}"
        print(f"{number}/{len(waiting)} {place} {result['end']}", flush=True)


def _test(mutant: Mutant, reached: Reached | None, options: argparse.Namespace) -> dict[str, Any]:
    if reached is None:
        result = run(mutant, options.files, 1800)
    else:
        tests = reached.choose(mutant, options.budget)
        result = run(mutant, tests, 60 + 10 * options.budget) if tests else {"end": "untested"}
    return result | {"module": mutant.module, "line": mutant.lines[0], "diff": mutant.diff}


def _waiting(options: argparse.Namespace) -> list[Mutant]:
    """The mutants to test, in a random order, so that any part of them is a sample."""
    ends = {key: row["end"] for key, row in _results().items()}
    names = [f"fbopt/{name}.py" for name in options.module or MODULES]
    found = [mutant for name in names for mutant in mutants(ROOT, name)]
    random.Random(options.seed).shuffle(found)
    wanted = MISSED if options.again else (None,)
    return [mutant for mutant in found if ends.get(_key(mutant)) in wanted][: options.sample]


def _key(mutant: Mutant) -> str:
    return f"{mutant.module}\n{mutant.diff}"


def _results() -> dict[str, dict[str, Any]]:
    """The last result of every mutant."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {f"{row['module']}\n{row['diff']}": row for row in rows}


def report(results: dict[str, dict[str, Any]], modules: Sequence[str]) -> None:
    """Print the mutants that survived, then the score of every module."""
    rows = [row for row in results.values() if Path(row["module"]).stem in modules]
    for row in sorted(rows, key=lambda row: (row["module"], row["line"])):
        if row["end"] not in KILLED:
            print(f"{row['end']} {row['module']}:{row['line']}\n{row['diff']}\n")
    print("module        mutants  killed  survived  untested  score")
    for name in modules:
        ends = [row["end"] for row in rows if Path(row["module"]).stem == name]
        killed = sum(end in KILLED for end in ends)
        counts = (len(ends), killed, ends.count("survived"), ends.count("untested"))
        print(f"{name:12} {counts[0]:8} {counts[1]:7} {counts[2]:9} {counts[3]:9}", end="")
        print(f"  {killed / max(1, len(ends)):5.1%}")


if __name__ == "__main__":
    sys.exit(main())
