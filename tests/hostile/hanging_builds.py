"""Compilers that do not end, and processes that keep what others wait for."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.hostile.trials import (
    FEW,
    LONG,
    RUN,
    SOON,
    STEPS,
    TRAIN,
    Program,
    Started,
    stop,
    trial,
    write_images,
)

BUILD = """import sys
from pathlib import Path
from fbopt._build.load import build
from fbopt._build.compiler import BuildError
try:
    build("tiny", [Path("tiny.cpp")], "a tiny library")
except BuildError as error:
    sys.exit(f"BuildError: {error}")
"""
COMPILER = """#!/bin/sh
case " $* " in *" WHERE "*) sleep 1000 ;; esac
exec c++ "$@"
"""
LIMIT = "FBOPT_BUILD_MINUTES=0.1"


def build(folder: Path, **more: str) -> Program:
    """Compile a tiny library into a cache of its own."""
    (folder / "tiny.cpp").write_text('extern "C" int answer() { return 42; }\n')
    more |= {"FBOPT_CACHE_DIR": f"{folder / 'cache'}"}
    return Program(folder, sys.executable, "-c", BUILD, **more)


def hanging_compiler(folder: Path, where: str) -> Program:
    (program := folder / "compiler").write_text(COMPILER.replace("WHERE", where))
    program.chmod(0o755)
    return build(folder, CXX=f"{program}", FBOPT_BUILD_MINUTES="0.1")


@trial("a compiler that never says its version", LIMIT, "at most 0.1 minutes for .*compiler",
       "compiler has not ended after 0.1 minutes; find out what it waits for", 1)  # fmt: skip
def _(folder: Path) -> Started:
    yield hanging_compiler(folder, "-E")


@trial("a compiler that never ends", LIMIT, "compiling a tiny library",
       "ninja has not ended after 0.1 minutes; find out what it waits for", 1)  # fmt: skip
def _(folder: Path) -> Started:
    yield hanging_compiler(folder, "-c")


@trial("another process that compiles is stopped", "FBOPT_WAIT_MINUTES=0.1",
       r"waiting for at most 0.1 minutes for process \d+ on \S+, which is compiling",
       r"locked for 0.1 minutes by process \d+ on \S+, .*; stop that process", 1)  # fmt: skip
def _(folder: Path) -> Started:
    (program := folder / "compiler").write_text(COMPILER.replace("WHERE", "-c"))
    program.chmod(0o755)
    yield (first := build(folder, CXX=f"{program}"))
    first.wait_for_words("compiling")
    stop(first.pid)
    yield build(folder, CXX=f"{program}", FBOPT_WAIT_MINUTES="0.1")


@trial("another process that decodes images is stopped", "FBOPT_WAIT_MINUTES=0.1",
       r"waiting for at most 0.1 minutes for process \d+ on \S+, which is decoding",
       r"locked for 0.1 minutes by process \d+ on \S+, .*; stop that process", 2)  # fmt: skip
def _(folder: Path) -> Started:
    write_images(folder, "val")
    own = {"FBOPT_CACHE_DIR": f"{folder / 'cache'}", "FBOPT_WAIT_MINUTES": "0.1"}
    slow = "import sys, time\nfrom fbopt.train.data import decode\n"
    slow += "decode.read_image = lambda file, change: time.sleep(1000)\n"
    slow += "from fbopt.train.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
    words = [*STEPS, *FEW, "--data", "imagenet:images", "--image-size", "8", "--model", "cnn"]
    first = Program(folder, sys.executable, "-c", slow, *words, "--out", "first", **own)
    yield first
    end = time.monotonic() + SOON
    while not list(folder.glob("cache/*.partial")) and time.monotonic() < end:
        time.sleep(0.05)
    stop(first.pid)
    yield Program(folder, *TRAIN, *words, "--out", "second", **own)


@trial("another process has the run folder, and is stopped", "1 s", "",
       "run is in use: another process is training into it; wait for it or stop it", 2)  # fmt: skip
def _(folder: Path) -> Started:
    yield (first := Program(folder, *TRAIN, *RUN, *LONG, "--processes", "1"))
    first.wait_for_steps()
    stop(first.pid)
    yield Program(folder, *TRAIN, *RUN, *FEW, "--overwrite")
