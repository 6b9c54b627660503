"""What trainers do with ragged batches, tokens and bfloat16, by themselves and with fbopt."""

from __future__ import annotations

import json

import pytest

from benchmarks import trainers
from benchmarks.cases import WrongResult

for name in trainers.TRAINERS:
    pytest.importorskip(name)
pytestmark = pytest.mark.usefixtures("one_thread")
CASES = trainers.cases(quick=True)


@pytest.mark.parametrize("trainer", trainers.TRAINERS)
def test_steps_are_those_of_one_batch_and_by_itself_they_are_not(trainer, tmp_path):
    path = trainers.main(
        ["--trainers", trainer, "--quick", "--threads", "1", "--out", str(tmp_path)]
    )
    content = json.loads(path.read_text())
    own, weighted, full_batch = content["errors"].values()
    assert own.keys() == weighted.keys() == full_batch.keys() | {"leftover window"}
    for case in CASES:
        limit = trainers.LIMITS[case.dtype]
        assert weighted[case.name] <= limit
        counts_by_itself = trainer == "transformers" and case.name == "Llama"
        assert (own[case.name] <= limit) == counts_by_itself
    assert trainer in content["machine"]


def test_a_wrong_result_is_not_reported(monkeypatch):
    from benchmarks.trainer_lightning import WAYS

    monkeypatch.setitem(WAYS, "WeightedAccumulation", WAYS["Lightning"])
    with pytest.raises(WrongResult, match="with fbopt"):
        trainers.errors("lightning", CASES[0])
