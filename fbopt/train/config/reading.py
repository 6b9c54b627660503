"""One way for every failure of input: what a library raises becomes an error with file and cure."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_type_hints

from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import Options, OptionsError, literals

LONGEST = 200  # characters of a library's message


@contextlib.contextmanager
def reading(what: str, error: type[Exception], cure: str) -> Iterator[None]:
    """Raise `error`, "what: reason; cure", for whatever is raised within.

    Decoders raise what they like, and what they raise says nothing of the file. Errors of fbopt,
    which do, pass, as do interruptions.
    """
    try:
        yield
    except (DataError, OptionsError, error):
        raise
    except MemoryError as raised:
        raise error(f"{what}: it does not fit into memory; {cure}") from raised
    except Exception as raised:
        raise error(f"{what}: {reason(raised)}; {cure}") from raised


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; OSError for others: a pipe would be waited for."""
    with open_regular(path) as file:
        return file.read()


def open_regular(path: Path | str, append: bool = False) -> BinaryIO:
    """Open a regular file, or where a link leads to one, to read it or to `append` to it.

    Raises OSError for others, such as a pipe, which would be waited for.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if append else os.O_RDONLY
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a pipe that nobody reads
            raise
        raise OSError(f"{path} is no regular file") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return os.fdopen(descriptor, "ab" if append else "rb")


def reason(raised: BaseException) -> str:
    """An exception in a line of at most LONGEST characters."""
    if isinstance(raised, KeyError):
        return f"it has no {shown(raised.args[0])}" if raised.args else "an entry is missing"
    said = getattr(raised, "strerror", None) or str(raised)
    return shown(f"{said or type(raised).__name__}")


def shown(value: Any) -> str:
    """A value in one line, of at most LONGEST characters that any terminal can print."""
    text = " ".join(str(value).split()).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def options_of(values: Any, where: str) -> Options:
    """The options that `Options.as_json` returned, once their types are right.

    Raises OptionsError, naming `where` they were read from: for an unknown option, and for a value
    of another type than the option's.
    """
    if not isinstance(values, Mapping):
        raise OptionsError(f"{where}: holds {type(values).__name__}, not the options of a run")
    for name, hint in get_type_hints(Options).items():
        if name in values and not _fits(values[name], hint):
            raise OptionsError(
                f"{where}: {name} is {shown(repr(values[name]))}, which is no value of this option"
            )
    return Options.from_json(dict(values))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON has the type of an option; a path is a string there."""
    choices = literals(hint)
    text = str(hint)
    if value is None:
        return type(None) in get_args(hint)
    if isinstance(value, bool):
        return "bool" in text
    if isinstance(value, str):
        return value in choices or "Path" in text or (not choices and "str" in text)
    if isinstance(value, int):
        return value in choices or "int" in text or "float" in text
    return isinstance(value, float) and "float" in text
