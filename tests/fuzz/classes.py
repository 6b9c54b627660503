"""The classes of attacks: the rows of the table in docs/robustness.md, and how often each is tried.

`quick` cases are tried with every run of the tests, `trials` for the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from fuzz import code, commands, readers, runs
from fuzz.arena import Arena
from fuzz.attack import Attack


class Class(NamedTuple):
    """What is attacked, in words, how, and in how many cases."""

    words: str
    attack: Callable[[Arena], Attack]
    quick: int
    trials: int


OBJECTS = partial(readers.records, names=readers.OBJECTS)
LINES = partial(readers.records, names=readers.LINES)
CLASSES = {
    "kills": Class("a run killed one to three times, in a write or anywhere", runs.kills, 3, 500),
    "corruptions": Class(
        "one to three files of a run damaged or replaced", runs.corruptions, 3, 1000
    ),
    "sequences": Class("kills, interrupts and damage in any order", runs.sequences, 0, 100),
    "forged": Class("checkpoints with the right SHA-256, forged", readers.forged, 8, 1200),
    "results": Class("result.json and options.json", OBJECTS, 8, 1000),
    "lines": Class("lines of metrics, fingerprints and environments", LINES, 8, 1000),
    "tables": Class("the same files, in tables and figures", readers.tables, 2, 200),
    "npz": Class("npz files", readers.npz, 25, 3000),
    "images": Class("images", readers.images, 15, 1200),
    "words": Class("command lines of all programs", commands.lines, 12, 1500),
    "variables": Class("environment variables", commands.environments, 1, 60),
    "outputs": Class("output that is closed, full or broken", commands.outputs, 6, 400),
    "planted": Class("libraries that others could have planted", code.planted, 50, 3000),
    "calls": Class("ops called with wrong arguments", code.calls, 60, 15_000),
}
