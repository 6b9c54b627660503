"""Training with exact sums: a whole run has the same bits in any order of the chunks."""

from __future__ import annotations

import dataclasses
import random

import pytest
import tiny_runs

from fbopt.train import build, loop
from fbopt.train.checkpoint.digest import GROUPS, fingerprint
from fbopt.train.config.options import OptionsError

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNKS = 10
ORDERS = [None, range(CHUNKS - 1, -1, -1), random.Random(0).sample(range(CHUNKS), CHUNKS)]
PAIRS = [[6, 7, 2, 3, 8, 9, 0, 1, 4, 5], [4, 5, 8, 9, 0, 1, 6, 7, 2, 3]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_runs.data(tmp_path_factory.mktemp("data"), count=75, side=8)


def trained(tiny, out, order, monkeypatch, **changes):
    """Fingerprint and last metrics of 5 steps: penalty, clipping, BatchNorm and dropout."""
    build_chunks = build.build_chunks

    def reordered(*arguments, **context):
        return dataclasses.replace(build_chunks(*arguments, **context), order=order)

    with monkeypatch.context() as patch:
        patch.setattr(build, "build_chunks", reordered)
        patch.setattr(loop, "draw_curves", lambda folder, options: False)
        options = tiny_runs.with_noise(tiny, out, steps=5, chunk_size=8, **changes)
        result = loop.train(options)
    found = fingerprint(result.folder.load())
    metrics = {k: result.summary[k] for k in ("loss", "train_accuracy", "test_accuracy")}
    return {name: found[name] for name in GROUPS} | metrics


def test_the_order_of_the_chunks_leaves_no_trace(tiny, tmp_path, monkeypatch):
    def runs(accumulation, orders):
        return [
            trained(tiny, tmp_path / f"{accumulation}-{i}", order, monkeypatch,
                    accumulation=accumulation)
            for i, order in enumerate(orders)
        ]  # fmt: skip

    exact = runs("exact", ORDERS)
    assert all(run == exact[0] for run in exact)
    natural, reverse = runs("float32", ORDERS[:2])
    assert natural["parameters"] != reverse["parameters"]
    assert natural["momentum"] != reverse["momentum"]


def test_the_order_of_groups_of_chunks_leaves_no_trace(tiny, tmp_path, monkeypatch):
    """The last group has the ragged chunk."""
    runs = [
        trained(tiny, tmp_path / str(i), order, monkeypatch, vectorize=2)
        for i, order in enumerate([None, *PAIRS])
    ]
    assert all(run == runs[0] for run in runs)


def test_exact_sums_are_refused_for_sgd(tiny, tmp_path):
    with pytest.raises(OptionsError, match="it is for sums over chunks"):
        loop.train(tiny_runs.options(tiny, tmp_path / "run", "sgd", accumulation="exact"))
