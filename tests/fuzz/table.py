"""`make robustness`: try every class of attacks, or those that are named, and write the table.

Each runs in a process of its own and writes its numbers to docs/robustness/counts/CLASS-SEED.jsonl,
so that one can be tried again alone, and with several seeds at once; the table in
docs/robustness.md adds up all files there. Other programs put files of such lines beside:
{"class", "trials", "survived", "failed"}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from fuzz.arena import Arena
from fuzz.attack import survey
from fuzz.classes import CLASSES

from fbopt._build import load

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, COUNTS = DOCS / "robustness.md", DOCS / "robustness" / "counts"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
HEAD = "| what is attacked | trials | survived | failed |\n| --- | ---: | ---: | ---: |"
PARTS = 10
Line = dict[str, Any]


def main() -> int:
    """Try the classes that are named, or only write the table; returns 1 if anything failed."""
    parser = argparse.ArgumentParser("fuzz.table", description=__doc__.partition("\n\n")[0])
    parser.add_argument("classes", nargs="*", default=list(CLASSES), metavar="CLASS")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--share", type=float, default=1.0, help="of the table's trials")
    parser.add_argument("--show", action="store_true", help="try nothing: write the table")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if unknown := set(wanted.classes) - set(CLASSES):
        parser.error(f"no class {', '.join(sorted(unknown))}; choose {', '.join(CLASSES)}")
    if wanted.alone:
        return alone(*wanted.classes, wanted.seed, wanted.share)
    for name in [] if wanted.show else wanted.classes:
        attack(name, wanted.seed, wanted.share)
    lines = read()
    write(lines)
    print(table(lines))
    return int(any(line["failed"] for line in lines))


def attack(name: str, seed: int, share: float) -> None:
    """Try a class in a process of its own; one that dies has failed."""
    words = [sys.executable, "-m", "fuzz.table", name, "--alone", f"--seed={seed}"]
    start = time.monotonic()
    done = subprocess.run([*words, f"--share={share}"], env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds = time.monotonic() - start
    print(f"{name}: status {done.returncode}, {seconds:.0f} s, seed {seed}", flush=True)
    if done.returncode not in (0, 1):
        record(name, seed, 1, 1)


def alone(name: str, seed: int, share: float) -> int:
    """Try a class here; failures are printed. Returns 1 if there are any."""
    chosen = CLASSES[name]
    total, tried, failed = max(1, round(share * chosen.trials)), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        attack = chosen.attack(Arena(Path(folder)))
        for part in range(PARTS):  # so that a run that is stopped has counted what it did
            found = survey(attack, -(-total // PARTS), PARTS * seed + part)
            attack = attack._replace(kept=())  # once
            tried, failed = tried + found[0], failed + found[1]
            record(name, seed, tried, failed)
    return int(failed > 0)


def record(name: str, seed: int, tried: int, failed: int) -> None:
    """Write the numbers of a class."""
    COUNTS.mkdir(parents=True, exist_ok=True)
    line = {"class": CLASSES[name].words, "trials": tried, "survived": tried - failed}
    line |= {"failed": failed, "torch": torch.__version__, "kernels": load.backend()}
    line["processor"] = torch.backends.cpu.get_cpu_capability()
    (COUNTS / f"{name}-{seed}.jsonl").write_text(json.dumps(line) + "\n")


def read() -> list[Line]:
    """The lines of all files, those of one class added up: first CLASSES in their order."""
    found: dict[str, Line] = {chosen.words: {} for chosen in CLASSES.values()}
    for path in sorted(COUNTS.glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            known = found.setdefault(line["class"], {})
            sums = {key: known.get(key, 0) + line[key] for key in ("trials", "survived", "failed")}
            found[line["class"]] = line | sums
    return [line for line in found.values() if line]


def table(lines: list[Line]) -> str:
    """The table in Markdown, with what it was measured on."""
    rows = [HEAD]
    for line in lines:
        counts = " | ".join(f"{line[key]:,}" for key in ("trials", "survived", "failed"))
        rows.append(f"| {line['class']} | {counts} |")
    facts = {
        key: sorted({line[key] for line in lines if key in line}) for key in ("torch", "processor")
    }
    on = f"torch {', '.join(facts['torch'])}, {', '.join(facts['processor'])}, Linux"
    return "\n".join(rows) + f"\n\nMeasured with {on}; `make robustness` measures it anew."


def write(lines: list[Line]) -> None:
    """Replace the table in the page."""
    text = PAGE.read_text(encoding="utf-8")
    new = f"{BEGIN}\n\n{table(lines)}\n\n{END}"
    PAGE.write_text(
        re.sub(f"{BEGIN}.*{END}", lambda found: new, text, flags=re.S), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
