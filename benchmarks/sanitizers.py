"""The CPU kernels under the compilers' sanitizers: calls of benchmarks.sanitized, tests of the ops.

    python -m benchmarks.sanitizers [address] [thread] [--counts FILE]

`address`, by g++ or clang, finds accesses out of bounds and undefined behaviour; `thread`, by clang
with its OpenMP and archer, unordered accesses by threads. The kernels run on torch's own threads:
torch finds clang's OpenMP in the place of gcc's, and archer tells the sanitizer what OpenMP orders.

Only the kernels are instrumented. Of torch the sanitizers see what it allocates, not what it
reads and writes itself. Faults are planted first: a sanitizer that misses one sees nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from benchmarks.sanitized import AGREED, PLANTED
from fbopt._build import load, ninja

DRIVER = (sys.executable, "-m", "benchmarks.sanitized", "--device", "cpu")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no")
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer")
OUTCOME = re.compile(r"(\d+) (passed|failed|error)")
# More threads than most machines have cores: they meet in other orders, too, and must not spin.
COMMON = {"FBOPT_BACKEND": "kernels", "OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"}
OPS = tuple(
    f"tests/ops/test_{name}.py"
    for name in ("ops", "overlap", "direct", "stacks", "fixed_point", "properties", "autograd")
)


class Missing(RuntimeError):
    """A sanitizer cannot be used here; the message tells what to install."""


@dataclass(frozen=True)
class Sanitizer:
    """How a sanitizer is used.

    Attributes:
        title: its name in the counts.
        flags: what the kernels are compiled with.
        runtimes: for gcc and for clang the libraries that are loaded before all others.
        variables: its options.
        faults: which planted faults it has to find, and what it says of them.
        tests: pytest's arguments.
    """

    title: str
    flags: str
    runtimes: dict[str, tuple[str, ...]]
    variables: dict[str, str]
    faults: dict[str, str]
    tests: tuple[str, ...]


MACHINE = os.uname().machine
SANITIZERS = {
    "address": Sanitizer(
        "AddressSanitizer and UBSan",
        "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=vptr",
        {"gcc": ("libasan.so", "libubsan.so"), "clang": (f"libclang_rt.asan-{MACHINE}.so",)},
        # Leaks would be Python's own; each allocation of torch would note a deep stack.
        {"ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=6"},
        {"overflow": "heap-buffer-overflow", "undefined": "signed integer overflow"},
        # The emulated kernels switch stacks; compiling under a sanitizer is slow.
        (*OPS, "-k", "not emulated and not compiled"),
    ),
    "thread": Sanitizer(
        "ThreadSanitizer",
        "-g1 -fsanitize=thread",
        {"clang": (f"libclang_rt.tsan-{MACHINE}.so", "libomp.so", "libarcher.so")},
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
        {"race": "data race"},
        (*OPS, "-k", "(thread or streamed) and not emulated"),
    ),
}


class Count(NamedTuple):
    """How often something was tried, and how it went."""

    what: str
    survived: int
    failed: int

    def line(self) -> str:
        """A line of JSON."""
        trials = self.survived + self.failed
        counts = {"trials": trials, "survived": self.survived, "failed": self.failed}
        return json.dumps({"class": self.what, **counts})


def environment(sanitizer: Sanitizer) -> dict[str, str]:
    """The variables that a sanitizer needs, or Missing."""
    compiler = find_compiler("gcc" not in sanitizer.runtimes)
    family = "clang" if "clang" in run((compiler, "--version")).stdout else "gcc"
    found = {name: library(compiler, name) for name in sanitizer.runtimes[family]}
    if lacking := [name for name, path in found.items() if path is None]:
        raise Missing(
            f"{sanitizer.title}: {compiler} comes without {' and '.join(lacking)}; install "
            "clang with its runtime and OpenMP (Debian, Ubuntu: apt install clang libomp-dev)"
        )
    archer = found.pop("libarcher.so", None)
    tools = {"OMP_TOOL_LIBRARIES": str(archer)} if archer else {}
    preloaded = {"LD_PRELOAD": " ".join(map(str, found.values()))}
    flags = {"CXX": compiler, "CXXFLAGS": sanitizer.flags}
    return COMMON | sanitizer.variables | flags | tools | preloaded


def find_compiler(needs_clang: bool) -> str:
    """Return CXX, or the first compiler on the PATH: clang in any version where it has to be."""
    clangs = ["clang++", *(f"clang++-{version}" for version in range(40, 13, -1))]
    names = [os.environ.get("CXX", ""), *(clangs if needs_clang else ("c++", "g++", *clangs))]
    for name in filter(None, names):
        if (path := shutil.which(name)) and (not needs_clang or "clang" in name):
            return path
    raise Missing("no clang++ on the PATH (Debian, Ubuntu: apt install clang libomp-dev)")


def library(compiler: str, name: str) -> Path | None:
    """The compiler's own library of that name."""
    path = Path(run((compiler, f"-print-file-name={name}")).stdout.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def run(
    command: Sequence[str], variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with further variables and keep what it says."""
    return subprocess.run(
        command,
        env={**os.environ, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def build(variables: dict[str, str]) -> None:
    """Compile the kernels and the planted faults, before anything is watched."""
    own = {name: variables[name] for name in ("CXX", "CXXFLAGS")}
    with patch.dict(os.environ, own):
        ninja.build(load.cpu_recipe())
        load.build(*PLANTED)


def missed(sanitizer: Sanitizer, variables: dict[str, str]) -> list[str]:
    """The planted faults that are not reported."""
    found = []
    for fault, words in sanitizer.faults.items():
        done = run((*DRIVER, "--plant", fault), variables)
        is_seen = done.returncode != 0 and REPORT.search(done.stdout) and words in done.stdout
        print(f"{sanitizer.title}, planted {fault}: {'found' if is_seen else 'NOT found'}")
        if not is_seen:
            print(done.stdout[-4000:])
            found.append(fault)
    return found


def judge(what: str, done: subprocess.CompletedProcess[str]) -> Count:
    """Count what agreed or passed, and the reports; whatever else ends a run is a failure."""
    numbers: dict[str, int] = {}
    for number, kind in OUTCOME.findall(done.stdout):
        numbers[kind] = int(number)
    if calls := re.search(rf"(\d+) {AGREED}", done.stdout):
        numbers["passed"] = int(calls[1])
    survived = numbers.get("passed", 0)
    failed = numbers.get("failed", 0) + numbers.get("error", 0) + len(REPORT.findall(done.stdout))
    if done.returncode != 0 or survived == 0:
        failed = max(1, failed)
    if failed:
        print(done.stdout[-8000:])
    return Count(what, survived, failed)


def check(sanitizer: Sanitizer) -> list[Count]:
    """Run the calls and the tests under a sanitizer that finds what is planted."""
    variables = environment(sanitizer)
    build(variables)
    if faults := missed(sanitizer, variables):
        return [Count(f"faults planted for {sanitizer.title}", 0, len(faults))]
    programs = {"calls of the kernels": DRIVER, "tests of the ops": (*PYTEST, *sanitizer.tests)}
    counts = []
    for what, command in programs.items():
        counts.append(judge(f"{what} under {sanitizer.title}", run(command, variables)))
        print(counts[-1].line(), flush=True)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sanitizers; return 1 if one of them has found something or cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizers", nargs="*", metavar="sanitizer", help=" or ".join(SANITIZERS))
    parser.add_argument("--counts", type=Path, help="append the counts to a file, a line each")
    choice = parser.parse_args(argv)
    if unknown := set(choice.sanitizers) - set(SANITIZERS):
        parser.error(f"no sanitizer {', '.join(unknown)}: choose from {', '.join(SANITIZERS)}")
    counts: list[Count] = []
    try:
        for name in choice.sanitizers or SANITIZERS:
            counts += check(SANITIZERS[name])
    except Missing as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if choice.counts:
            with choice.counts.open("a", encoding="utf-8") as file:
                file.writelines(f"{count.line()}\n" for count in counts)
    return int(any(count.failed for count in counts))


if __name__ == "__main__":
    sys.exit(main())
