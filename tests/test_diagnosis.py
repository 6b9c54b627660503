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
    assert len(found) == len(set(found)) == 1
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


def with_debug(name):
    build = RIGHT[name] if name in RIGHT else MISTAKES[name][0]
    closure, optimizer = build()
    closure.debug = True
    return closure, optimizer


def test_debug_raises_for_errors_before_anything_is_changed():
    closure, _ = with_debug("class_weights")
    before = everything(closure)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"debug=True\) found 1 error") as error:
            closure()
        assert "weights[chunk[1]].sum()" in str(error.value)
        assert everything(closure) == before


def test_debug_warns_of_doubts_once():
    closure, _ = with_debug("contrastive_loss")
    with pytest.warns(UserWarning, match=r"debug=True\) found 1 doubt"):
        closure()
    closure()  # a second warning would be an error
    assert closure.step == 2


def test_debug_prints_a_line_once_and_changes_no_step(capsys):
    losses = []
    for debug in (False, True):
        torch.manual_seed(0)
        closure, optimizer = with_debug("cnn_with_batchnorm_dropout_and_penalty")
        closure.debug = debug
        losses.append([optimizer.step(closure).item() for _ in range(2)])
    assert losses[0] == losses[1]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("fbopt check: all right (3 of 4 chunks")


def test_debug_sees_the_optimizer_that_steps():
    closure, _ = with_debug("recurrent_network")
    optimizer = fbopt.FullBatchGD(list(closure.model.parameters())[:2], lr=0.1)
    with pytest.warns(UserWarning, match="the others never move: weight_hh_l0|bias_ih_l0"):
        optimizer.step(closure)


def test_gradients_taken_by_backward():
    build, about, _ = MISTAKES["token_means_weighted_by_sequences"]
    closure, _ = build()
    closure.backward = True
    assert [f.about for f in fbopt.check(closure).findings] == [about]
    assert all(p.grad is None for p in closure.model.parameters())


def test_chunks_may_hold_sparse_tensors():
    model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
    closure = fbopt.FullBatchClosure(
        model,
        chunks=[(torch.eye(8).to_sparse(), x)],
        evaluate=lambda model, chunk: (chunk[0] @ model(chunk[1])).square().mean(),
    )
    assert fbopt.check(closure).ok
