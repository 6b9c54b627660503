import json
import statistics

import pytest
from scipy.stats import t

from benchmarks import changes
from fbopt.train.config.options import Options
from fbopt.train.ladder.summary import spread


def ladder(path, accuracies, **options):
    """A ladder.json with one row, whose runs have these accuracies by seed."""
    runs = [
        {"seed": seed, "test_accuracy": accuracy, "train_accuracy": 1.0, "loss": 0.01}
        for seed, accuracy in accuracies.items()
    ]
    row = {"row": "fb-clip", "options": Options(**options).as_json(), "runs": runs}
    row |= {key: spread([run[key] for run in runs]) for key in ("test_accuracy", "loss")}
    path.write_text(json.dumps({"rows": [row]}))
    return str(path)


def test_changed_rows_are_paired_with_the_unchanged_by_seed(tmp_path, capsys):
    base = ladder(tmp_path / "base.json", {1: 0.5, 2: 0.6, 3: 0.4}, steps=300, warmup=40)
    changed = {3: 0.45, 1: 0.53, 2: 0.61}
    longer = ladder(tmp_path / "longer.json", changed, steps=600, warmup=80, threads=1)
    larger = ladder(tmp_path / "larger.json", {1: 0.5}, steps=300, warmup=40, lr=0.2)
    slower = ladder(tmp_path / "slower.json", {1: 0.5}, steps=300, warmup=80)
    changes.main([base, longer, larger, slower])
    lines = capsys.readouterr().out.splitlines()[2:]
    told = ["–", "`--steps 600`", "`--lr 0.2`", "`--warmup 80`"]
    assert [line.split(" | ")[1] for line in lines] == told
    half = t.ppf(0.975, 2) * statistics.stdev([3, 1, 5]) / 3**0.5
    low, high = (f"{3 + s * half:+.2f}".replace("-", "−") for s in (-1, 1))
    assert f"+3.00 ({low} to {high}) | 3 |" in lines[1]
    assert "+0.00 | 1 |" in lines[2]
    assert "50.00 ± 10.00" in lines[0] and "53.00 ± 8.00" in lines[1]


def test_ladders_without_a_row_in_common_are_refused(tmp_path):
    base = ladder(tmp_path / "base.json", {1: 0.5})
    other = json.loads((tmp_path / "base.json").read_text())
    other["rows"][0]["row"] = "sgd"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match=r"other\.json: has none of the rows fb-clip"):
        changes.main([base, str(tmp_path / "other.json")])
    with pytest.raises(SystemExit, match="usage"):
        changes.main([base])


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="not the ladder"):
        changes.main([str(path), str(path)])
