"""Train one run of a ladder, in a process of its own: options as JSON on stdin, a log on stdout."""

from __future__ import annotations

import json
import sys


def main() -> int:
    """Returns the exit status of `fbopt train`."""
    try:
        from fbopt.train.__main__ import run
        from fbopt.train.config.options import Options

        return run(Options.from_json(json.load(sys.stdin)))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
