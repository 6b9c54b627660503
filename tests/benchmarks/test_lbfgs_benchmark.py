"""The benchmark of L-BFGS runs, writes its JSON, and stops at wrong steps."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import lbfgs
from benchmarks.cases import WrongResult
from fbopt import LBFGS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_runs_and_is_written(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.setattr(lbfgs, "limits", lambda words, device: [])
    given = ["--quick", "--threads", "1", "--problems", "rosenbrock", "--out", str(tmp_path)]
    found = json.loads(lbfgs.main(given).read_text())
    rows = found["evaluations"]["rosenbrock"]
    assert [row["name"] for row in rows] == list(lbfgs.METHODS)
    assert all(row["reached"] == 1 and 0 < row["evaluations"][0] < 5000 for row in rows)
    assert len(found["tables"]) == 2 and found["words_per_parameter"][lbfgs.OURS] < 206


@pytest.mark.parametrize("name", lbfgs.PROBLEMS)
def test_problems_are_functions_of_their_parameters(name):
    """The same from the same start, with a gradient for each parameter."""
    pytest.importorskip("sklearn")
    values = []
    for seed in (0, 0, 1):
        params, loss = lbfgs.PROBLEMS[name].make(seed)
        value = loss()
        grads = torch.autograd.grad(value, params)
        assert value.dtype == torch.float64 and all(g.any() for g in grads)
        values.append(value.item())
    assert values[0] == values[1] != values[2]
    assert (
        sum(p.numel() for p in params)
        == {"rosenbrock": 100, "logistic": 650, "burgers": 1341}[name]
    )


def test_a_wrong_step_is_caught(monkeypatch):
    honest = LBFGS.step

    def wrong(self, closure):
        self.param_groups[0]["lr"] *= 1.01
        return honest(self, closure)

    monkeypatch.setattr(LBFGS, "step", wrong)
    with pytest.raises(WrongResult, match=r"fbopt.LBFGS: the 31st iterate is off"):
        lbfgs.check_iterations()
