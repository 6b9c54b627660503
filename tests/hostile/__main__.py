"""What a hostile machine does to training: hangs, a bad network, runs without end.

    python -m tests.hostile hangs|network|long [NAME …] [--write]

Prints a table, and exits with 1 where anything is not as it has to be. `--write` keeps the table of
a whole suite in docs/robustness/.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys

import torch

from fbopt._build.load import backend
from tests.hostile import hangs, long, network
from tests.hostile.tables import markdown
from tests.hostile.trials import ROOT

SUITES = {"hangs": hangs, "network": network, "long": long}


def keep(suite: str, text: str) -> None:
    """Put a table in its place among the documentation."""
    mark = f"<!-- python -m tests.hostile {suite} -->\n"
    for path in (ROOT / "docs" / "robustness").glob("*.md"):
        page = path.read_text()
        pattern = f"(?s)(?<={re.escape(mark)}).*?(?=<!-- end -->)"
        path.write_text(re.sub(pattern, lambda _: f"\n{text}\n", page))


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("names", nargs="*", help="words of the trials' names; default: all")
    parser.add_argument("--write", action="store_true", help="keep the table in docs/robustness/")
    wanted = parser.parse_args()
    suite = SUITES[wanted.suite]
    rows, note = suite.main(wanted.names)
    if note:
        print(note)
        return 0
    table = markdown(suite.HEADER, rows)
    processor = f"{os.cpu_count()} cores of {platform.machine()} "
    processor += torch.backends.cpu.get_cpu_capability()
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {processor}, "
    where += f"Linux {'.'.join(platform.release().split('.')[:2])}, {backend()}"
    holds = f"{sum(row.holds for row in rows)} of {len(rows)} as they have to be"
    command = f"python -m tests.hostile {wanted.suite}"
    print(text := f"`{command}` ({where}; {holds}):\n\n{table}")
    if wanted.write and not wanted.names:
        keep(wanted.suite, text)
    return int(not rows or not all(row.holds for row in rows))


if __name__ == "__main__":
    sys.exit(main())
