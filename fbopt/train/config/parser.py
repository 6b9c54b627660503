"""Command lines from dataclasses: one option per field, with the docstring below it as its help.

A type gives the metavar (INT, FLOAT, PATH or the choices), `GROUPS` the titles: {title: first
field}. A field without a default is positional. A typing error names the nearest option or value.
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
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from fbopt.train.config.options import flag, literals

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
    shown = classes[0]
    usage = "".join(f" {f.name.upper()} ..." for f in fields(shown) if f.default is MISSING)
    about = wrapped(inspect.getdoc(shown) or "")
    parser = _Parser(program, f"{program} [options]{usage}", about, wrapped(notes))
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    _add_options(parser, shown, hints)
    known = {field.name: field for cls in reversed(classes) for field in fields(cls)}
    for name in known.keys() - {field.name for field in fields(shown)}:
        _add_option(parser, known[name], hints[name], argparse.SUPPRESS)
    words = sys.argv[1:] if arguments is None else arguments
    words = [re.sub("^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in words]
    values, unknown = parser.parse_known_args(words)
    for word in sorted(unknown, key=lambda word: not word.startswith("-"))[:1]:
        kind = "unknown option" if word.startswith("-") else "unexpected argument"
        parser.error(f"{kind} {word}{nearest(word, map(flag, known))}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(values).items()}
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


class _Parser(argparse.ArgumentParser):
    """A parser with short errors, which sets only what is given."""

    def __init__(self, *words: str) -> None:
        super().__init__(
            *words,
            formatter_class=_Formatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help lists all options\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Breaks no line within a name such as fb-penalty."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Value(NamedTuple):
    """What the words after an option may be: one of `choices`, or of `kind`; several if `many`."""

    choices: dict[str, Any]
    kind: type | None
    many: bool

    @classmethod
    def of(cls, hint: Any) -> _Value:
        """Read a type hint: a type, a Literal, a tuple of one, or a union of those and None."""
        if many := get_origin(hint) is tuple:
            hint = get_args(hint)[0]
        types = [
            t for t in (get_args(hint) or (hint,)) if isinstance(t, type) and t is not NoneType
        ]
        words = (True, False) if bool in types else literals(hint)
        kind = next((t for t in types if t is not bool), None)
        return cls({str(word): word for word in words}, kind, many)

    def convert(self, word: str) -> Any:
        """The value of a word."""
        if word in self.choices:
            return self.choices[word]
        if self.kind is None:
            hint = nearest(word, self.choices) or f"; choose {', '.join(self.choices)}"
            raise argparse.ArgumentTypeError(f"unknown value {word}{hint}")
        try:
            return self.kind(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word} is no {self.kind.__name__}") from error

    def metavar(self, name: str) -> str:
        """What stands for the value in the help."""
        kind = [METAVARS.get(self.kind, name.upper())] if self.kind else []
        words = "|".join([*self.choices, *kind])
        return words if len(words) <= LONGEST else "NAME"


def _add_options(parser: _Parser, cls: type, hints: dict[str, Any]) -> None:
    """Add the fields of a dataclass under the titles of its groups."""
    titles = {first: title for title, first in getattr(cls, "GROUPS", {}).items()}
    texts, group = _docstrings(cls), parser
    for field in fields(cls):
        if field.name in titles:
            group = parser.add_argument_group(titles[field.name])
        text = _help(texts[field.name], _Value.of(hints[field.name]), field.default)
        _add_option(group, field, hints[field.name], text)


def _add_option(group: Any, field: Field, hint: Any, text: str) -> None:
    value = _Value.of(hint)
    words = {"type": value.convert, "metavar": value.metavar(field.name), "help": text}
    if field.default is MISSING:
        group.add_argument(field.name, nargs="*", default=(), **words)
    elif "True" not in value.choices:
        group.add_argument(flag(field.name), nargs="*" if value.many else None, **words)
    else:
        once = {"action": "store_true", "help": text}
        often = {"nargs": "?", "const": True, **words}  # --nesterov, or --nesterov False
        group.add_argument(flag(field.name), **(once if hint is bool else often))
        off = {"action": "store_false", "dest": field.name, "help": argparse.SUPPRESS}
        group.add_argument(flag(f"no_{field.name}"), **off)


def _help(text: str, value: _Value, default: Any) -> str:
    """A field's docstring, with its choices and default if they stand nowhere else."""
    if value.metavar("") == "NAME":
        text += f" One of {', '.join(value.choices)}."
    if "Default:" not in text and default not in (MISSING, "") and default is not False:
        values = default if isinstance(default, tuple) else (default,)
        text += f" Default: {' '.join(f'{v:g}' if v == 0 else str(v) for v in values)}."
    return text.replace("%", "%%")


def _docstrings(cls: type) -> dict[str, str]:
    """The string below each field in the source of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
