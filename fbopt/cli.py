"""The command `fbopt`: one sub-command per program, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# name: (module with a main, what it does)
COMMANDS = {
    "train": ("fbopt.train.__main__", "train a network by full-batch gradient descent, or SGD"),
    "ladder": (
        "fbopt.train.ladder.plan",
        "train several recipes and seeds, write a table and figures",
    ),
    "recipes": ("fbopt.train.config.recipes", "list the recipes, with the accuracies of the paper"),
    "fingerprint": (
        "fbopt.train.checkpoint.fingerprint",
        "print a run's SHA-256 by step, compare two runs",
    ),
    "analyze": ("fbopt.train.analyze.__main__", "measure what kind of minimum a run reached"),
    "doctor": ("fbopt.doctor", "say what this machine has, what fbopt uses, what is missing"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt COMMAND …`; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"fbopt: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    run = importlib.import_module(COMMANDS[name][0]).main
    if name != "doctor":
        return run(arguments[1:])
    if len(arguments) > 1:
        print(f"usage: fbopt doctor\n\n{COMMANDS[name][1]}")
        return 0 if arguments[1] in ("-h", "--help") else 2
    return run()


def usage() -> str:
    """The help of the whole program."""
    rows = "\n".join(f"  {name:11} {words}" for name, (_, words) in COMMANDS.items())
    return f"usage: fbopt COMMAND [options]\n\n{rows}\n\nfbopt COMMAND --help says more."


if __name__ == "__main__":
    sys.exit(main())
