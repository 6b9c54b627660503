"""fbopt.check: deliberate mistakes are named, right set-ups are silent, and nothing is changed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import bits
from diagnosis_cases import MISTAKES, RIGHT

import fbopt


@pytest.fixture(autouse=True)
def _same_case_each_time():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_mistake_is_named(name):
    build, about, words = MISTAKES[name]
    diagnosis = fbopt.check(*build())
    found = [str(f) for f in diagnosis.findings if f.about == about]
    assert any(words in text for text in found), str(diagnosis)


@pytest.mark.parametrize("name", RIGHT)
def test_right_set_up_is_silent(name):
    diagnosis = fbopt.check(*RIGHT[name]())
    assert diagnosis.ok and not diagnosis.findings, str(diagnosis)
    assert str(diagnosis).splitlines()[0].startswith("all right (3 of ")
    assert "loss" in diagnosis.checked


def everything(closure):
    """All that a check could leave behind."""
    tensors = [*closure.model.state_dict().values(), torch.get_rng_state()]
    tensors += [p.grad for p in closure.sums.params if p.grad is not None]
    modes = [m.training for m in closure.model.modules()]
    state = np.random.get_state()[1]
    return bits(tensors), modes, closure.step, random.getstate(), state.tolist()


@pytest.mark.parametrize("name", [*RIGHT, "noise_from_numpy", "evaluate_takes_a_step"])
def test_nothing_is_changed(name):
    closure, _ = RIGHT[name]() if name in RIGHT else MISTAKES[name][0]()
    closure()
    grads = [p.grad for p in closure.sums.params]
    before = everything(closure)
    fbopt.check(closure)
    assert everything(closure) == before
    assert all(p.grad is g for p, g in zip(closure.sums.params, grads, strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_a_check_does_not_change_the_next_steps(name):
    losses = []
    for checked in (False, True):
        torch.manual_seed(0)
        closure, optimizer = RIGHT[name]()
        if checked:
            fbopt.check(closure, optimizer)
        torch.manual_seed(1)
        losses.append([optimizer.step(closure).item() for _ in range(2)])
    assert losses[0] == losses[1]


def test_world_size_without_process_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    closure, _ = RIGHT["recurrent_network"]()
    (finding,) = fbopt.check(closure).findings
    assert finding.severity == "error" and "process_group=" in finding.cure


def test_arguments():
    closure, _ = RIGHT["recurrent_network"]()
    with pytest.raises(TypeError, match="closure must be a FullBatchClosure, got function"):
        fbopt.check(lambda: None)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        fbopt.check(closure, closure)
