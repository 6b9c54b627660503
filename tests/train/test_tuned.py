"""Hyperparameters of a ladder that were chosen on held-out samples, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import parse
from fbopt.train.ladder import runner
from fbopt.train.ladder.__main__ import main
from fbopt.train.ladder.plan import Ladder, make_plan


def row(**options: float) -> dict:
    common = {"validation": 0.1, "test": "never"}
    return {"options": options, "common": common, "validation_accuracy": 0.9, "trials": []}


def chosen(folder: Path, **changes) -> Path:
    rows = {"sgd": row(lr=0.03, batch_size=25), "fb-penalty": row(lr=0.7, penalty=2.0)}
    content = {"chosen_by": "validation_accuracy", "rows": rows}
    path = folder / "tuned.json"
    path.write_text(json.dumps(content | changes))
    return path


def words(tiny: str, path: Path, *more: str) -> list[str]:
    given = ["--data", tiny, "--rows", "sgd", "fb-penalty", "--seeds", "1", "--width", "4"]
    return [*given, "--tuned", str(path), "--out", str(path.parent / "out"), *more]


def test_every_row_has_what_was_chosen_for_it(tiny, tmp_path):
    plan = make_plan(*parse("fbopt ladder", words(tiny, chosen(tmp_path)), Ladder, Options))
    (sgd,), (penalty,) = plan.runs.values()
    assert (sgd.lr, sgd.batch_size, sgd.penalty) == (0.03, 25, None)
    assert (penalty.lr, penalty.penalty, penalty.chunk_size) == (0.7, 2.0, None)


BAD = {
    "test set": (
        {"chosen_by": "test_accuracy"},
        "its rows were chosen by test_accuracy, and only validation_accuracy",
    ),
    "looked": (
        {"rows": {"sgd": row(), "fb-penalty": row() | {"common": {"validation": 0.1}}}},
        "the trials of fb-penalty looked at the test set",
    ),
    "not held out": (
        {"rows": {"sgd": row() | {"common": {"test": "never"}}, "fb-penalty": row()}},
        "the trials of sgd looked at the test set",
    ),
    "no row": ({"rows": {"sgd": row()}}, "has no fb-penalty; tune it, too"),
    "unknown": (
        {"rows": {"sgd": row(learning_rate=1), "fb-penalty": row()}}, "learning_rate is no option",
    ),
    "list": ({"rows": []}, "cannot be read"),
    "shape": ({"rows": {"sgd": 3, "fb-penalty": row()}}, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_choices_by_the_test_set_are_refused_and_files_that_are_none(
    tiny, tmp_path, capsys, monkeypatch, case
):
    changes, message = BAD[case]
    monkeypatch.setattr(runner.Runner, "start", lambda *a: pytest.fail("a run was started"))
    assert main(words(tiny, chosen(tmp_path, **changes))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read_are_named(tiny, tmp_path):
    path = tmp_path / "tuned.json"
    for content in (None, b"", b"\xff", b"[1]", b"null"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(OptionsError, match="cannot be read"):
            make_plan(*parse("fbopt ladder", words(tiny, path), Ladder, Options))


def test_what_was_chosen_is_not_given_again(tiny, tmp_path):
    given = words(tiny, chosen(tmp_path), "--lr", "0.5")
    with pytest.raises(OptionsError, match=r"--lr: --tuned .* has chosen it"):
        make_plan(*parse("fbopt ladder", given, Ladder, Options))
