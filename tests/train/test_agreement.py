"""Whether a difference between processes is seen, whichever of them has more; and what is saved."""

from __future__ import annotations

from typing import Any

import pytest

from fbopt.train import agreement
from fbopt.train.agreement import ProcessesDiffer, check_state
from fbopt.train.checkpoint import saver
from fbopt.train.checkpoint.saver import Saver


def prints(**momentum: str) -> dict[str, Any]:
    """What `fingerprint` gives, of a state with some momentum."""
    tensors = {"parameters": {"weight": "a"}, "momentum": momentum, "buffers": {}}
    return {"tensors": tensors, **{group: str(found) for group, found in tensors.items()}}


class Job:
    """The processes of a job, of which each call gathers what all have."""

    is_single = False

    def __init__(self, *found: dict[str, Any]) -> None:
        self._answers = iter(
            [[[f[g] for g in agreement.GROUPS] for f in found], [f["tensors"] for f in found]]
        )

    def all_gather_object(self, own: object) -> list[Any]:
        return next(self._answers)


class Run:
    step = 7

    def __init__(self, context: Job) -> None:
        self.context = context

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"weight": "m"}, {}, "the momentum weight of process 1"),
        ({}, {"weight": "m"}, "the momentum weight of process 1"),
        ({"weight": "m"}, {"weight": "n"}, "the momentum weight of process 1"),
    ],
)
def test_a_tensor_that_one_process_lacks_is_a_difference(monkeypatch, first, second, words):
    monkeypatch.setattr(agreement, "fingerprint", lambda state: prints(**first))
    with pytest.raises(ProcessesDiffer, match=f"at step 7 {words} is not that of process 0"):
        check_state(Run(Job(prints(**first), prints(**second))))
    check_state(Run(Job(prints(**first), prints(**first))))


def test_what_is_due_is_decided_once(monkeypatch, tmp_path):
    """Minutes pass while the others are waited for: nothing is saved that was not compared."""
    now = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])

    class Options:
        save_every, fingerprint_every = None, 0

    class Trainer:
        options, step = Options, 1

    one = Saver(Trainer(), None, dict, None)
    saved = []
    monkeypatch.setattr(one, "save", lambda: saved.append(now[0]))
    due = one.due()
    now[0] = saver.SAVE_SECONDS + 1
    one.write(due)
    assert not saved
    one.write(one.due())
    assert saved == [saver.SAVE_SECONDS + 1]
