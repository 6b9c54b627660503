"""`--seeds` and `--grid`: what they expand to, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbopt.train.__main__ import main
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import parse, value_of
from fbopt.train.config.sweep import MOST, NUMBERS, RECORDS, Sweep, differing, parse_seeds

FIELDS = set(vars(Options()))


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0", [0]),
        ("0-3", [0, 1, 2, 3]),
        ("0,3,7-9", [0, 3, 7, 8, 9]),
        (" 5 - 6 , 2", [5, 6, 2]),
        ("4-4", [4]),
        (str(2**63 - 1), [2**63 - 1]),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing is no seed"),
        ("0,", "nothing is no seed"),
        ("a", "a is no seed"),
        ("-1", "-1 is no seed"),
        ("1.5", "1.5 is no seed"),
        ("3-1", "3-1 ends before it begins"),
        ("0-3,2", "2 is there twice"),
        ("0-99999999", f"at most {MOST:,}"),
        ("1-2-3", "1-2-3 is no seed"),
        ("٣", "is no seed"),
    ],
)
def test_seeds_that_are_none(text, words):
    with pytest.raises(OptionsError, match=words):
        parse_seeds(text)


def test_names_are_options():
    assert set(NUMBERS + RECORDS) <= FIELDS and not set(NUMBERS) & set(RECORDS)


def test_a_grid_is_a_product_of_typed_values():
    grid = ("lr=0.1,0.2", "penalty=0.5,1", "nesterov=False", "max-norm=inf", "warmup=3")
    runs = Sweep("1-2", grid).expand(Options(recipe="fb-penalty"))
    assert len(runs) == 8
    assert [(o.lr, o.penalty, o.seed) for o in runs[:5]] == [
        (0.1, 0.5, 1), (0.1, 0.5, 2), (0.1, 1.0, 1), (0.1, 1.0, 2), (0.2, 0.5, 1),
    ]  # fmt: skip
    for o in runs:
        assert (o.nesterov, o.max_norm, o.warmup) == (False, float("inf"), 3)
    assert len({o.folder for o in runs}) == 8


def test_folders():
    base = Options(data="digits", recipe="fb")
    assert (
        Sweep("0-1").expand(base)[1].folder
        == Path("runs/digits-fb-s1")
        == (Options(data="digits", recipe="fb", seed=1).folder)
    )
    (one,) = Sweep(grid=("lr=0.1",)).expand(Options(recipe="fb", seed=4, out=Path("here")))
    assert one.folder == Path("here/fb-lr=0.1-s4") and one.seed == 4


@pytest.mark.parametrize(
    ("sweep", "options", "words"),
    [
        (Sweep(grid=()), {}, "give options and values"),
        (Sweep(grid=("lr",)), {}, "an option and its values"),
        (Sweep(grid=("lr=",)), {}, "an option and its values"),
        (Sweep(grid=("lr=0.1,",)), {}, "nothing is no value of lr"),
        (Sweep(grid=("lr=fast",)), {}, "fast is no value of lr"),
        (Sweep(grid=("lr=0.1,0.10",)), {}, "a value is there twice"),
        (Sweep(grid=("lr=0.1", "lr=0.2")), {}, "lr is there twice"),
        (Sweep(grid=("seed=1,2",)), {}, "--seeds 1,2"),
        (Sweep(grid=("width=4,8",)), {}, "give one value for all"),
        (Sweep(grid=("penalti=4,8",)), {}, "did you mean penalty"),
        (Sweep(grid=("milestones=0.5",)), {}, "give one value for all"),
        (Sweep(grid=("schedule=linear",)), {}, "linear is no value of schedule"),
        (Sweep(grid=("lr=0.1",)), {"lr": 0.3}, "contradicts --lr 0.3"),
        (Sweep("0-2"), {"seed": 3}, "--seed 3 contradicts"),
        (Sweep("0-2"), {"resume": Path("run")}, "goes on with one run"),
        (Sweep("0-4095", ("lr=0.1,0.2",)), {}, "8,192 runs"),
    ],
)
def test_what_is_refused(sweep, options, words):
    with pytest.raises(OptionsError, match=words):
        sweep.expand(Options(**options))


def test_what_networks_have_to_share_is_all_the_rest():
    one = Options()
    assert list(differing([one, Options(lr=0.1, seed=4, out=Path("x"))])) == []
    assert list(differing([one, one, Options(width=4)])) == [("width", None, 4)]


def test_values_are_those_of_the_command_line():
    assert value_of(Options, "norm_type", "inf") == "inf"
    assert value_of(Options, "norm_type", "3") == 3.0
    assert value_of(Options, "nesterov", "True") is True


def test_the_command_line_has_both():
    words = ["--seeds=0-3", "--grid", "lr=0.1,0.2", "penalty=1", "--recipe", "fb"]
    options, sweep = parse("fbopt train", words, Options, Sweep)
    assert options == Options(recipe="fb")
    assert sweep == Sweep("0-3", ("lr=0.1,0.2", "penalty=1")) and sweep.is_given
    assert not parse("fbopt train", [], Options, Sweep)[1].is_given


def test_errors_and_help_of_the_command_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "runs")]
    assert main(["--seeds", "2-1", *out]) == 2
    assert "2-1 ends before it begins" in capsys.readouterr().err
    assert main(["--grid", *out]) == 2
    assert "give options and values" in capsys.readouterr().err
    assert main(["--recipe", "sgd", "--seeds", "0-1", *out]) == 2
    assert "full-batch recipes alone" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--seeds LIST" in capsys.readouterr().out
