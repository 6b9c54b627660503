"""Groups of chunks: which chunks form one, and when it is worked on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fbopt import FullBatchClosure, GradientPenalty
from fbopt._engine.chunk_groups import grouped


def test_a_group_is_there_with_its_last_chunk():
    """What is drawn in a group depends on what its own chunks have seeded, not on the next's."""
    fetched: list[int] = []

    def chunks():
        for index in range(7):
            fetched.append(index)
            yield index, (torch.zeros(2),), 2.0

    found = [(group.indices, fetched[-1]) for group in grouped(chunks(), 3)]
    assert found == [([0, 1, 2], 2), ([3, 4, 5], 5), ([6], 6)]


def test_a_group_has_its_chunks_of_each_kind():
    sizes = [2, 3, 2, 2, 3, 2]
    weighed = ((i, (torch.zeros(n),), 1.0) for i, n in enumerate(sizes))
    assert [group.indices for group in grouped(weighed, 4)] == [[0, 2, 3], [1], [4], [5]]


def test_chunks_that_are_left_out_move_no_other_to_another_group():
    weighed = ((i, (torch.zeros(2),), 1.0) for i in (0, 1, 4, 6, 7))
    assert [group.indices for group in grouped(weighed, 3)] == [[0, 1], [4], [6, 7]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_draws_that_are_seeded_by_group_do_not_depend_on_the_order_of_the_groups(count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = torch.randn(36, 5), torch.randint(3, (36,))
    chunks = list(zip(x.split(3), y.split(3), strict=True))
    groups = [range(i, i + count) for i in range(0, len(chunks), count)]

    class Seeded:
        def __init__(self, order):
            self.order = order

        def __iter__(self):
            for group in self.order:
                for index in group:
                    torch.manual_seed(index // count)
                    yield chunks[index]

    def grads(order):
        closure = FullBatchClosure(
            model,
            F.cross_entropy,
            Seeded(order),
            penalty=GradientPenalty(coefficient=0.1),
            accumulation="exact",
            vectorize=count,
        )
        closure()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = grads(groups)
    assert torch.equal(grads(groups[::-1]), expected)
    assert torch.equal(grads(groups[1::2] + groups[::2]), expected)
