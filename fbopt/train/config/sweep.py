"""Many runs from one command line: `--seeds 0-31`, `--grid lr=0.1,0.2 penalty=0.5,1`, or both.

Seeds and the values of every word of the grid are combined, each with each, in this order.
"""

from __future__ import annotations

import itertools
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fbopt.train.config.options import Options, OptionsError, flag
from fbopt.train.config.parser import nearest, value_of

MOST = 4096  # networks of one command
# Options in which networks that are trained at once may differ: first those of a grid, then those
# of records and those that the others bring with them.
NUMBERS = (
    "lr", "momentum", "nesterov", "weight_decay", "decay", "max_norm", "penalty", "radius", "rho",
    "sam_share", "warmup", "cosine", "schedule", "floor", "milestones", "gamma", "first_rate",
)  # fmt: skip
RECORDS = (
    "seed", "recipe", "perturbation", "method", "out", "overwrite", "resume", "eval_every",
    "log_every", "log", "chunk_norms", "track", "every", "save_every", "keep", "fingerprint_every",
    "test", "tta", "scope",
)  # fmt: skip
NO_GRID = ("\0",)  # words that no command line can have
NOTES = """many runs at once, each with a folder of its own:

  --seeds LIST  seeds such as 0-31 or 0,3,7-9
  --grid NAME=VALUES ...
                values, such as lr=0.1,0.2 penalty=1,2

Networks that differ in seeds and such numbers alone are trained together, for small full-batch
runs without BatchNorm."""


@dataclass(frozen=True)
class Sweep:
    """The options of `fbopt train` for many runs at once."""

    seeds: str | None = None
    """Seeds of the runs, such as 0-31 or 0,3,7-9."""
    grid: tuple[str, ...] = NO_GRID
    """Options and their values, such as lr=0.1,0.2 penalty=0.5,1."""

    @property
    def is_given(self) -> bool:
        """Whether there is more than one run to expect."""
        return self.seeds is not None or self.grid != NO_GRID

    def expand(self, options: Options) -> list[Options]:
        """The options of all runs, each with a folder of its own.

        That is runs/DATA-RECIPE-NAME=VALUE-sSEED, or RECIPE-NAME=VALUE-sSEED in --out, as a ladder
        names them. Raises OptionsError.
        """
        if options.resume not in (None, "auto"):
            raise OptionsError(
                f"--resume {options.resume} goes on with one run; give --resume auto with --seeds "
                "and --grid, or leave these out"
            )
        seeds = self._seeds(options)
        names, values = self._values(options)
        count = len(seeds) * math.prod(map(len, values))
        if count > MOST:
            raise OptionsError(
                f"--seeds and --grid: {count:,} runs, and at most {MOST:,} are trained at once; "
                "give fewer"
            )
        found = []
        for chosen in itertools.product(*values):
            changes = dict(zip(names, chosen, strict=True))
            for seed in seeds:
                one = replace(options, seed=seed, **changes)
                found.append(replace(one, out=_folder(one, changes)))
        return found

    def _seeds(self, options: Options) -> list[int]:
        if self.seeds is None:
            return [options.seed]
        if options.seed != Options.seed:
            raise OptionsError(
                f"--seed {options.seed} contradicts --seeds {self.seeds}; leave one of them out"
            )
        return list(parse_seeds(self.seeds))

    def _values(self, options: Options) -> tuple[list[str], list[list[Any]]]:
        """The names of the grid and the values of each."""
        found: dict[str, list[Any]] = {}
        if self.grid == ():
            raise OptionsError("--grid: give options and values, as in --grid lr=0.1,0.2")
        for word in self.grid if self.grid != NO_GRID else ():
            name, values = _parse_word(word)
            if name in found:
                raise OptionsError(f"--grid {word}: {name} is there twice; give all values at once")
            if getattr(options, name) != getattr(Options, name):
                raise OptionsError(
                    f"--grid {word} contradicts {flag(name)} {getattr(options, name)}; leave one "
                    "of them out"
                )
            found[name] = values
        return list(found), list(found.values())


def parse_seeds(text: str) -> list[int]:
    """The seeds in a list of numbers and ranges, "0,3,7-9". Raises OptionsError."""
    cure = "numbers and ranges with commas between, as in 0,3,7-9"
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?", part, re.ASCII)
        if match is None:
            raise OptionsError(f"--seeds {text}: {part.strip() or 'nothing'} is no seed; {cure}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise OptionsError(f"--seeds {text}: {part.strip()} ends before it begins; {cure}")
        if len(found) + last - first >= MOST:
            raise OptionsError(f"--seeds {text}: at most {MOST:,} runs are trained at once")
        found += range(first, last + 1)
    for seed in found:
        if found.count(seed) > 1:
            raise OptionsError(f"--seeds {text}: {seed} is there twice; name each seed once")
    return found


def _parse_word(word: str) -> tuple[str, list[Any]]:
    """The option and the values in a word of the grid, "lr=0.1,0.2"."""
    name, equals, text = word.removeprefix("--").partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not text.strip():
        raise OptionsError(
            f"--grid {word}: an option and its values with commas between, as in lr=0.1,0.2"
        )
    if name == "seed":
        raise OptionsError(f"--grid {word}: seeds have an option of their own, --seeds {text}")
    if name not in NUMBERS or name == "milestones":  # which are lists themselves
        hint = nearest(name, NUMBERS)
        raise OptionsError(
            f"--grid {word}: {name} is not one of the options in which runs that are trained at "
            f"once may differ{hint or ', which are ' + ', '.join(NUMBERS)}; give one value for all"
        )
    values = [_value(word, name, part.strip()) for part in text.split(",")]
    if len({repr(v) for v in values}) < len(values):
        raise OptionsError(f"--grid {word}: a value is there twice; name each once")
    return name, values


def _value(word: str, name: str, text: str) -> Any:
    try:
        return value_of(Options, name, text)
    except (ArgumentTypeError, ValueError) as error:
        raise OptionsError(f"--grid {word}: {text or 'nothing'} is no value of {name}") from error


def _folder(options: Options, changes: dict[str, Any]) -> Path:
    """The folder of a run, by what it differs in."""
    own = "".join(f"-{name}={value}" for name, value in changes.items())
    name = f"{options.recipe}{own}-s{options.seed}"
    return options.out / name if options.out else Path("runs") / f"{options.data_name}-{name}"


def differing(all_options: list[Options]) -> Iterator[tuple[str, Any, Any]]:
    """Options that networks trained at once must share and do not: name and two values."""
    first = all_options[0]
    for name in vars(first):
        if name in NUMBERS + RECORDS:
            continue
        for other in all_options[1:]:
            if getattr(other, name) != getattr(first, name):
                yield name, getattr(first, name), getattr(other, name)
                break
