"""Hyperparameters of a ladder that were chosen on held-out samples, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fbopt.train import loop
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.parser import parse
from fbopt.train.ladder import runner
from fbopt.train.ladder.__main__ import main
from fbopt.train.ladder.plan import Ladder, make_plan

DATA = "npz:elsewhere/tiny.npz"  # the same name as that of the runs' file


def row(**options: float) -> dict:
    common = {"validation": 0.1, "test": "never", "data": DATA, "width": 4}
    found = {"options": options, "common": common, "validation_accuracy": 0.9, "trials": [{}] * 12}
    return found | {"passes": 4}


def with_common(changes: dict, **options: float) -> dict:
    found = row(**options)
    return found | {"common": found["common"] | changes}


def chosen(folder: Path, **changes) -> Path:
    rows = {"sgd": row(lr=0.03, batch_size=25), "fb-penalty": row(lr=0.7, penalty=2.0)}
    content = {"chosen_by": "validation_accuracy", "rows": rows}
    path = folder / "tuned.json"
    path.write_text(json.dumps(content | changes))
    return path


def words(tiny: str, path: Path, *more: str) -> list[str]:
    given = ["--data", tiny, "--rows", "sgd", "fb-penalty", "--seeds", "1", "--width", "4"]
    given += ["--first-seed", "1", "--validation", "0.1", "--share", "0.02"]
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
        {"rows": {"sgd": row(), "fb-penalty": with_common({"test": "always"})}},
        "the trials of fb-penalty looked at the test set",
    ),
    "not held out": (
        {"rows": {"sgd": with_common({"validation": 0.0}), "fb-penalty": row()}},
        "no samples were held out for sgd",
    ),
    "other samples held out": (
        {"rows": {"sgd": with_common({"validation": 0.2}), "fb-penalty": row()}},
        "was chosen on --validation 0.2, and these samples stay out of training",
    ),
    "other data": (
        {"rows": {"sgd": with_common({"data": "digits"}), "fb-penalty": row()}},
        "was chosen on --data digits",
    ),
    "seed": (
        {"rows": {"sgd": with_common({"seed": 1}), "fb-penalty": row()}},
        "its trials had seed 1, which was then chosen for; give --first-seed 2",
    ),
    "property": ({"rows": {"sgd": row(passes=3), "fb-penalty": row()}}, "passes is none of lr"),
    "own": ({"rows": {"sgd": row(seed=3), "fb-penalty": row()}}, "seed is none of lr"),
    "no row": ({"rows": {"sgd": row()}}, "has no fb-penalty; tune it, too"),
    "unknown": (
        {"rows": {"sgd": row(learning_rate=1), "fb-penalty": row()}}, "learning_rate is none of lr",
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


def test_the_table_tells_how_rows_were_tuned_and_what_differs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)
    given = words(tiny, chosen(tmp_path), "--dropout", "0.1")
    for options in make_plan(*parse("fbopt ladder", given, Ladder, Options)).last_row_first:
        loop.train(options)
    assert main(given) == 0
    told = "- `sgd`, tuned in 12 trials of 4 passes: --lr 0.03, --batch-size 25 "
    assert f"{told}(with --dropout 0.0, here 0.1)" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "ladder.json").read_text())
    sgd = content["rows"][0]["tuned"]
    assert sgd["options"] == {"lr": 0.03, "batch_size": 25}
    assert (sgd["trials"], sgd["passes"], sgd["validation_accuracy"]) == (12, 4, 0.9)
    assert sgd["differences"] == ["--dropout 0.0, here 0.1"]
    (run,) = content["rows"][0]["runs"]
    assert run["seed"] == 1 and "validation_accuracy" in run
