"""``fbopt check``: import a script, find its closure, print the verdict of fbopt.check."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fbopt.train.config.parser import fail, nearest, wrapped

NOTES = """\
SCRIPT is a file or a module; NAME in it a FullBatchClosure, or a function without arguments that
returns one (default: closure). The script is imported: what stands under
`if __name__ == "__main__":` does not run. Exit status: 0 all right, or doubts alone; 1 an error was
found; 2 there is no such closure."""


class ScriptError(Exception):
    """A script or a name in it that cannot be used; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict; return 0, 1 (an error was found) or 2 (there is no such closure)."""
    parser = argparse.ArgumentParser(
        "fbopt check",
        description="Look for mistakes in a closure, by a few passes over its first chunks.",
        epilog=wrapped(NOTES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="SCRIPT:NAME", help="such as train.py:closure")
    parser.add_argument(
        "--optimizer",
        metavar="NAME",
        help="the optimizer that steps, in the same script (default: the closure's)",
    )
    options = parser.parse_args(arguments)
    script, name = split(options.target)
    try:
        module = load(script)
        closure = find(module, name)
        optimizer = find(module, options.optimizer) if options.optimizer else None
        diagnosis = _check(closure, optimizer)
    except ScriptError as error:
        return fail(f"fbopt check: {error}", 2)
    print(diagnosis)
    return 0 if diagnosis.ok else 1


def _check(closure: Any, optimizer: Any) -> Any:
    import fbopt

    try:
        return fbopt.check(closure, optimizer)
    except TypeError as error:
        raise ScriptError(str(error)) from error


def split(target: str) -> tuple[str, str]:
    """The script and the name in SCRIPT:NAME; C:/train.py has a colon of another kind."""
    script, colon, name = target.rpartition(":")
    if not colon or "/" in name or "\\" in name:
        return target, "closure"
    return script, name


def load(script: str) -> ModuleType:
    """Import a file, or a module by its name, with its folder first on the path."""
    path = Path(script)
    try:
        if path.suffix != ".py" and not path.exists():
            sys.path.insert(0, os.getcwd())
            return importlib.import_module(script)
        if not path.is_file():
            raise ScriptError(f"there is no file {script}")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ScriptError(f"{script} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # so that workers of a DataLoader find it
        spec.loader.exec_module(module)
        return module
    except (KeyboardInterrupt, ScriptError):
        raise
    except SystemExit as error:
        hint = 'put what trains under `if __name__ == "__main__":`'
        raise ScriptError(f"{script} ends with exit status {error.code}: {hint}") from error
    except ModuleNotFoundError as error:
        if error.name == script.partition(".")[0]:
            raise ScriptError(f"there is no module or file {script}") from error
        raise ScriptError(_failure(script, error)) from error
    except Exception as error:
        raise ScriptError(_failure(script, error)) from error


def find(module: ModuleType, name: str) -> Any:
    """The object of this name (dots lead into it), or what it returns if it is a function."""
    found: Any = module
    for word in name.split("."):
        if not hasattr(found, word):
            near = nearest(word, vars(found))
            raise ScriptError(f"{module.__name__} has no {name}{near}")
        found = getattr(found, word)
    if not inspect.isroutine(found):
        return found
    try:
        return found()
    except Exception as error:
        raise ScriptError(_failure(f"{name}()", error)) from error


def _failure(what: str, error: Exception) -> str:
    """Say where a script fails, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    where = f" (line {own[0].lineno} of {Path(own[0].filename).name})" if own else ""
    return f"{what} fails{where}: {type(error).__name__}: {' '.join(str(error).split())}"
