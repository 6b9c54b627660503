"""Command lines from dataclasses: one option per field, with the docstring below it as its help.

A type gives the metavar (INT, FLOAT, PATH or the choices), `GROUPS` the titles: {title: first
field}. A field without a default is positional. For a mistyped word the error names the nearest.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from fbopt.train.config.options import flag, literals
from fbopt.train.config.paths import path_of

METAVARS = {int: "INT", float: "FLOAT", Path: "PATH"}
LONGEST = 40  # characters; longer lists of choices stand in the text instead of the metavar


def parse(
    program: str, arguments: Sequence[str] | None, *classes: type, notes: str = ""
) -> list[Any]:
    """Parse a command line into one instance of each dataclass; exits on --help and on errors (2).

    Args:
        program: the command, such as "fbopt train".
        arguments: the words after it; None: those of this process.
        classes: the dataclasses. The help shows the docstring and the options of the first; options
            of the others may be given too. A field that several of them have is one option.
        notes: text below the options.
    """
    usage = "".join(f" {f.name.upper()} ..." for f in fields(classes[0]) if f.default is MISSING)
    about = wrapped(inspect.getdoc(classes[0]) or "")
    parser = _Parser(
        program,
        f"{program} [options]{usage}",
        about,
        wrapped(notes),
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    known: set[str] = set()
    for cls in classes:
        _add_options(parser, cls, known)
    words = sys.argv[1:] if arguments is None else arguments
    words = [re.sub("^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in words]
    values, unknown = parser.parse_known_args(words)
    for word in sorted(unknown, key=lambda word: not word.startswith("-"))[:1]:
        kind = "unknown option" if word.startswith("-") else "unexpected argument"
        parser.error(f"{kind} {word}{nearest(word, map(flag, known))}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(values).items()}
    many = {f.name for cls in classes for f in fields(cls) if _is_many(get_type_hints(cls)[f.name])}
    for name, value in given.items():
        if value == () and name not in many:  # argparse drops the word -- also behind --name=
            parser.error(f"{flag(name)}: invalid value --")
    return [
        cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given}) for cls in classes
    ]


def command_line(options: Any) -> list[str]:
    """The words that make `parse` return these options, of a dataclass with single values."""
    words = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name if value else f"no_{field.name}"))
        else:
            words.append(f"{flag(field.name)}={value}")
    return words


def value_of(cls: type, name: str, word: str) -> Any:
    """The value that a word gives an option of a dataclass.

    Raises ArgumentTypeError or ValueError where it is none.
    """
    _, choices, kind = _kinds(get_type_hints(cls)[name])
    return _converter(choices, kind)(word)


def nearest(word: str, known: Iterable[str]) -> str:
    """The words "; did you mean …?" for the most similar known one; "" if none is similar."""
    found = difflib.get_close_matches(word.partition("=")[0], list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def wrapped(text: str) -> str:
    """Paragraphs that wrap where the terminal ends; those that begin with a space stay as is."""
    width = shutil.get_terminal_size().columns - 2
    return "\n\n".join(
        part if part.startswith(" ") else textwrap.fill(" ".join(part.split()), width)
        for part in text.split("\n\n")
    )


def fail(message: str, status: int) -> int:
    """Print what went wrong, if anything, to stderr; returns the exit status."""
    if message:
        print(message, file=sys.stderr, flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser with short errors."""

    def print_help(self, file: Any = None) -> None:
        """Print the help; unlike argparse's, it fails if stdout is a closed pipe."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        text = message.removeprefix("argument ")
        self.exit(2, f"{self.prog}: {text}\n{self.prog} --help lists all options\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Breaks no line within a name such as fb-penalty."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _add_options(parser: _Parser, cls: type, known: set[str]) -> None:
    """Add the fields that are not `known` yet; only those of the first class are in the help."""
    titles = {first: title for title, first in getattr(cls, "GROUPS", {}).items()}
    hints, texts, hidden = get_type_hints(cls), _docstrings(cls), bool(known)
    group: Any = parser
    for field in fields(cls):
        if field.name in titles and not hidden:
            group = parser.add_argument_group(titles[field.name])
        if field.name not in known:
            _add_option(group, field, hints[field.name], "" if hidden else texts[field.name])
    known.update(field.name for field in fields(cls))


def _add_option(group: Any, field: Field, hint: Any, text: str) -> None:
    """Add one field; it is left out of the help without a text."""
    many = _is_many(hint)
    hint = get_args(hint)[0] if many else hint
    types, choices, kind = _kinds(hint)
    metavar = "|".join([*choices, *([METAVARS.get(kind, field.name.upper())] if kind else [])])
    if text and len(metavar) > LONGEST:
        metavar, text = "NAME", f"{text} One of {', '.join(choices)}."
    help = _with_default(text, field.default) if text else argparse.SUPPRESS
    words = {"type": _converter(choices, kind), "metavar": metavar, "help": help}
    if field.default is MISSING:
        words["metavar"] = field.name.upper()
        group.add_argument(field.name, nargs="*", default=(), **words)
    elif bool not in types:
        group.add_argument(flag(field.name), nargs="*" if many else None, **words)
    else:  # --download, but --nesterov or --nesterov False
        once = {"action": "store_true", "help": help}
        maybe = {"nargs": "?", "const": True, **words}
        group.add_argument(flag(field.name), **(once if hint is bool else maybe))
        off = {"action": "store_false", "dest": field.name, "help": argparse.SUPPRESS}
        group.add_argument(flag(f"no_{field.name}"), **off)


def _kinds(hint: Any) -> tuple[list[type], dict[str, Any], type | None]:
    """The types in a hint, the choices by their words, and the type of all other words."""
    types = [t for t in get_args(hint) or (hint,) if isinstance(t, type) and t is not NoneType]
    choices = {str(v): v for v in ((True, False) if bool in types else literals(hint))}
    return types, choices, next((t for t in types if t is not bool), None)


def _is_many(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _with_default(text: str, default: Any) -> str:
    """The help text of an option, whose default None means the recipe's unless the text says so."""
    if "Default:" not in text and default not in (MISSING, "") and default is not False:
        values = default if isinstance(default, tuple) else (default,)
        words = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        text += f" Default: {'from the recipe' if default is None else words}."
    return text.replace("%", "%%")


def _converter(choices: dict[str, Any], kind: type | None) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        if word in choices or kind:
            if word in choices:
                return choices[word]
            return path_of(word) if kind is Path else kind(word)
        hint = nearest(word, choices) or f"; choose {', '.join(choices)}"
        raise argparse.ArgumentTypeError(f"unknown value {word}{hint}")

    convert.__name__ = kind.__name__ if kind else "choice"  # for argparse's "invalid int value"
    return convert


def _docstrings(cls: type) -> dict[str, str]:
    """The string below each field in the source of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
