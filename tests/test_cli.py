"""The command `fbopt`: its help, typing errors, and a closed pipe."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import fbopt
from fbopt.cli import COMMANDS, main
from fbopt.train import config
from fbopt.train.config.options import Options, flag
from fbopt.train.config.parser import command_line, parse
from fbopt.train.config.recipes import NAMES
from fbopt.train.output import CLOSED_PIPE


def status(*arguments: str) -> int:
    """The status that the process would end with."""
    try:
        return main(list(arguments))
    except SystemExit as stop:
        return stop.code


def python(code: str, **settings) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, **settings)


def test_usage(capsys):
    assert status() == status("--help") == 0
    out = capsys.readouterr().out
    assert all(out.count(f"\n  {name} ") == 2 for name in COMMANDS)
    assert status("--version") == 0
    assert capsys.readouterr().out == f"fbopt {fbopt.__version__}\n"


def test_help_and_typing_errors_import_no_torch():
    code = """
import contextlib, io, sys
from fbopt.cli import main
for line in ("--help", "trian", "train --help", "train --lrr 1", "ladder --help", "recipes"):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with contextlib.suppress(SystemExit):
            main(line.split())
    assert out.getvalue() and not {"torch", "matplotlib"} & set(sys.modules), line
"""
    done = python(code)
    assert done.returncode == 0, done.stderr.decode()


def test_config_imports_no_torch():
    names = [f"{config.__name__}.{module.name}" for module in pkgutil.iter_modules(config.__path__)]
    assert "fbopt.train.config.diff" in names
    done = python(f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", ["train", "ladder", "recipes"])
def test_help_wraps_where_the_terminal_ends(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert status(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert command == "recipes" or max(map(len, lines)) > columns - 12


def test_help_of_train(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert status("train", "--help") == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\w[\w' ]*):$", out, re.M) == ["options", *Options.GROUPS, "recipes"]
    assert "None" not in out and "{" not in out and all(name in out for name in NAMES)
    texts = re.split(r"^  (?=--)", out.partition("\nrecipes:")[0], flags=re.M)
    texts = {text.split()[0]: " ".join(text.split()) for text in texts}
    for field in fields(Options):
        text = texts[flag(field.name)]
        assert ("Default: " in text) == (field.default is not False and field.default != ""), text
    assert texts["--radius"].endswith("exact products have none. Default: from the recipe.")
    assert texts["--steps"].startswith("--steps INT ")
    assert texts["--method"].startswith("--method forward|central|exact ")
    assert texts["--resume"].startswith("--resume auto|PATH ")


ERRORS = {
    "trian": "fbopt: no command trian; did you mean train?",
    "fit": "fbopt: no command fit\n",
    "--verison": "fbopt: no command --verison; did you mean --version?",
    "train --lrr 1": "fbopt train: unknown option --lrr; did you mean --lr?",
    "train --batchsize=1": "unknown option --batchsize=1; did you mean --batch-size?",
    "train --xyzzy": "fbopt train: unknown option --xyzzy\n",
    "train fb-clip": "fbopt train: unexpected argument fb-clip",
    "train --st 3": "unknown option --st",
    "train --recipe fb-pnalty": "--recipe: unknown value fb-pnalty; did you mean fb-penalty?",
    "train --method x": "--method: unknown value x; choose forward, central, exact",
    "train --steps many": "--steps: invalid int value: 'many'",
    "train --lr": "--lr: expected one argument",
    "train --nesterov maybe": "--nesterov: unknown value maybe; choose True, False",
    "ladder --sedes 3": "fbopt ladder: unknown option --sedes; did you mean --seeds?",
    "ladder --lrr 1": "fbopt ladder: unknown option --lrr; did you mean --lr?",
    "ladder --rows fb fb-best": "--rows: unknown value fb-best; did you mean fb",
    "recipes --scale smal": "fbopt recipes: --scale: unknown value smal; did you mean small?",
}


@pytest.mark.parametrize("line", ERRORS)
def test_typing_errors_name_the_nearest(line, capsys):
    assert status(*line.split()) == 2
    out, err = capsys.readouterr()
    assert ERRORS[line] in err and len(err.splitlines()) == 2 and not out


LINES = {
    "": {},
    "--lr 1e-3 --lr=0.5 --max-norm inf": {"lr": 0.5, "max_norm": float("inf")},
    "--chunk_size 7": {"chunk_size": 7},
    "--no-nesterov": {"nesterov": False},
    "--nesterov False": {"nesterov": False},
    "--nesterov --download": {"nesterov": True, "download": True},
    "--resume auto --norm-bias-power 2": {"resume": "auto", "norm_bias_power": 2},
    "--resume a_b/c --track noise": {"resume": Path("a_b/c"), "track": "noise"},
}


@pytest.mark.parametrize("line", LINES)
def test_command_lines(line):
    (options,) = parse("fbopt train", line.split(), Options)
    assert options == Options(**LINES[line])
    assert parse("fbopt train", command_line(options), Options) == [options]


@dataclass(frozen=True)
class Sample:
    """A 100 % sample."""

    runs: tuple[Path, ...]
    """What is read."""
    kinds: tuple[Literal["one", "two"], ...] = ("one",)
    """Kinds, 50 % of each."""
    tolerance: float = 1e-3
    """A share."""


def test_other_dataclasses(capsys):
    assert parse("x", ["a", "b", "--kinds", "two", "one"], Sample) == [
        Sample((Path("a"), Path("b")), ("two", "one"))
    ]
    assert parse("x", [], Sample) == [Sample(())]
    with pytest.raises(SystemExit):
        parse("x", ["--help"], Sample)
    out = capsys.readouterr().out
    assert out.startswith("usage: x [options] RUNS ...\n\nA 100 % sample.\n")
    assert "Kinds, 50 % of each. Default: one.\n" in out and "A share. Default: 0.001.\n" in out


@pytest.mark.parametrize("line", ["--help", "train --help", "recipes"])
def test_a_closed_pipe_ends_quietly(line):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        code = f"import sys; from fbopt.cli import main; sys.exit(main({line.split()}))"
        done = python(code, stdout=closed)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, b"")
