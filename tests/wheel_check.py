"""One wheel under several versions of torch, each in a fresh environment without any compiler.

Builds the wheel as a user would (build isolation, settings of pip from the environment), then for
each version installs it, runs the parity tests and trains a few steps. Nothing may get compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# The oldest that is supported, one between, and the newest that pip finds. At least one is to be a
# build without CUDA: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS says where to look for such builds.
VERSIONS = ("torch==2.10.0", "torch==2.13.0", "torch")
ROOT = Path(__file__).resolve().parent.parent
COMPILERS = ("c++", "g++", "gcc", "cc", "clang++", "clang", "nvcc")
HEADINGS = ("torch", "CUDA", "Python", "kernels", "CUDA kernels", "parity tests", "training")
FACTS = """import json, platform
import torch
from fbopt._build import load
module, cuda = load.kernels(), load.find_cuda()
if cuda:
    load.cuda_kernels()
print(json.dumps({
    "torch": torch.__version__,
    "CUDA": torch.version.cuda or "none",
    "Python": platform.python_version(),
    "kernels": module.instruction_set,
    "CUDA kernels": cuda.name if cuda else "none",
    "files": [path for path in (module.__file__, str(cuda) if cuda else None) if path],
}))
"""


class CheckError(RuntimeError):
    """A step failed, with what it printed."""


@dataclass
class Environment:
    """A virtual environment of its own, and what was found out with it."""

    folder: Path
    wheel: Path
    version: str
    row: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Install and try; the findings go into the row as they come."""
        self.row["torch"] = self.version
        self.install()
        facts = json.loads(self.python("-c", FACTS).splitlines()[-1])
        for file in facts.pop("files"):
            if not Path(file).is_relative_to(self.folder / "environment"):
                raise CheckError(f"{file} is not the wheel's")
        self.row.update(facts)
        self.row["parity tests"] = self.test()
        self.row["training"] = self.train()
        if any(self.cache.rglob("*")):
            raise CheckError(f"something was compiled: {[*self.cache.rglob('*')]}")

    @property
    def cache(self) -> Path:
        """What must stay empty."""
        return self.folder / "cache"

    def install(self) -> None:
        """Install the wheel with one version of torch, and what tests and training need."""
        run([sys.executable, "-m", "venv", str(self.folder / "environment")])
        wheel = f"fbopt[train,test] @ {self.wheel.as_uri()}"
        python = str(self.folder / "environment" / "bin" / "python")
        run([python, "-m", "pip", "install", "--quiet", self.version, wheel])

    def python(self, *arguments: str) -> str:
        """Run Python where neither a compiler nor the checkout is in reach."""
        programs = self.folder / "environment" / "bin"
        for name in COMPILERS:
            if found := shutil.which(name, path=programs):
                raise CheckError(f"there is a compiler: {found}")
        kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "PYTHONPATH")}
        environment = {
            **kept,
            "PATH": str(programs),
            "FBOPT_BACKEND": "kernels",
            "FBOPT_CACHE_DIR": str(self.cache),
        }
        return run([str(programs / "python"), *arguments], env=environment, cwd=self.folder)

    def test(self) -> str:
        """Run the parity tests, without those that compile for themselves."""
        shutil.copytree(ROOT / "tests", self.folder / "tests")
        options = ("-q", "-p", "no:cacheprovider", "-k", "not emulated", "tests/ops/test_ops.py")
        return self.python("-m", "pytest", *options).splitlines()[-1].strip("= ")

    def train(self) -> str:
        """Train a few steps on digits by the training program; return its loss at both ends."""
        self.python(
            *("-m", "fbopt.train", "--data", "digits", "--steps", "4", "--out", "run"),
            *("--device", "cpu"),
        )
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        if not losses[-1] < losses[0]:
            raise CheckError(f"the loss did not fall: {losses}")
        return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def run(command: Sequence[str], **options: object) -> str:
    """Run a command and return what it printed."""
    process = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if process.returncode != 0:
        last = "\n".join(process.stdout.splitlines()[-40:])
        raise CheckError(f"{' '.join(command)} failed:\n{last}")
    return process.stdout


def build(folder: Path) -> Path:
    """Build the wheel of this checkout."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder)]
    run([*pip, str(ROOT)], env={**os.environ, "FBOPT_BACKEND": "kernels"})
    (wheel,) = folder.glob("fbopt-*.whl")
    return wheel


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return the findings in Markdown."""
    cells = [HEADINGS, ["---"] * len(HEADINGS), *([r.get(h, "") for h in HEADINGS] for r in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> int:
    """Check every version; return 0 if all is as it should be, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="such as torch==2.11.0")
    versions, rows, failures = parser.parse_args().versions, [], 0
    with tempfile.TemporaryDirectory(prefix="fbopt-wheel-") as scratch:
        say("building the wheel")
        wheel = build(Path(scratch))
        say(f"{wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB")
        for version in versions:
            start, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=scratch))
            environment = Environment(folder, wheel, version)
            rows.append(environment.row)
            say(f"{version}: installing, testing, training")
            try:
                environment.check()
                say(f"{version}: passed in {time.monotonic() - start:.0f} s")
            except CheckError as error:
                failures += 1
                environment.row["training"] = "FAILED"
                say(f"{version}: {error}")
            shutil.rmtree(folder)
    print(f"\n{wheel.name}\n\n{table(rows)}\n")
    if all(row.get("CUDA") != "none" for row in rows):
        say("no build of torch without CUDA was among them; see PIP_EXTRA_INDEX_URL")
    say(f"{failures} of {len(rows)} failed" if failures else "all passed, nothing was compiled")
    return 1 if failures else 0


def say(message: str) -> None:
    """Print it at once: the steps take minutes."""
    print(f"wheel-check: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
