"""The command `fbopt`: one subcommand per program, each imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fbopt import __version__
from fbopt.train.config.parser import nearest
from fbopt.train.output import until_closed

# name: (module with a main, what it does)
COMMANDS = {
    "train": ("fbopt.train.__main__", "train a network by full-batch gradient descent, or by SGD"),
    "ladder": ("fbopt.train.ladder.__main__", "train several recipes and seeds, and compare them"),
    "recipes": ("fbopt.train.config.listing", "list the recipes and the accuracies of the paper"),
    "fingerprint": ("fbopt.train.checkpoint.fingerprint", "print a run's hashes, compare two runs"),
    "analyze": ("fbopt.train.analyze.__main__", "measure what kind of minimum a run reached"),
    "plot": ("fbopt.train.plot.__main__", "draw metrics of several runs over each other"),
    "flow": ("fbopt.train.flow.__main__", "follow a continuous-time flow beside a run"),
    "check": ("fbopt.check_script", "look for mistakes in the closure of a script of your own"),
    "doctor": ("fbopt.doctor", "show what fbopt finds and uses on this machine"),
}
IN_FILES = ("train", "ladder", "analyze", "plot", "flow")  # those whose results are in files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt COMMAND …`; returns the exit status, 141 if stdout is closed before the end, 1
    where all that a command does is print, and that fails.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    in_files = words[:1] in ([name] for name in IN_FILES) and not {"-h", "--help"} & set(words)
    return until_closed(lambda: _run(words), needed=not in_files)


def _run(words: list[str]) -> int:
    name, *rest = words or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"fbopt {__version__}")
        return 0
    if name not in COMMANDS:
        near = nearest(name, [*COMMANDS, "--help", "--version"])
        print(f"fbopt: no command {name}{near}\nfbopt --help lists all commands", file=sys.stderr)
        return 2
    module, about = COMMANDS[name]
    run = importlib.import_module(module).main
    if name == "doctor":  # without options
        argparse.ArgumentParser("fbopt doctor", description=about).parse_args(rest)
        return run()
    return run(rest)


def usage() -> str:
    """The help of the whole program."""
    rows = "\n".join(f"  {name:11}  {words}" for name, (_, words) in COMMANDS.items())
    return f"""\
usage: fbopt COMMAND [options]

Full-batch training in PyTorch.

{rows}

fbopt COMMAND --help lists its options; fbopt --version prints the version."""


if __name__ == "__main__":
    sys.exit(main())
