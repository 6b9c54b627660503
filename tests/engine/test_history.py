"""L-BFGS's history: its compact form against two loops in float64, damping, what it forgets."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import bits

from fbopt._engine.flat_rows import FlatRows, combine_, largest, products, rows
from fbopt._engine.history import DAMPED, History

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(7, 3), (), (5,), (0,), (2, 2, 2)]


def parameters(dtypes=(torch.float64,)):
    return [torch.zeros(s, dtype=dtypes[i % len(dtypes)]) for i, s in enumerate(SHAPES)]


def rows_of(layout, values):
    """A row that holds the values one after the other."""
    row = rows(layout.make(1), 0)
    views = layout.views(row)
    parts = values.split([v.numel() for v in views])
    for view, part in zip(views, parts, strict=True):
        view.copy_(part.view(view.shape))
    return row


def flat(layout, row):
    return torch.cat([v.double().reshape(-1) for v in layout.views(row)])


def two_loops(pairs, g):
    """-H g as in Nocedal and Wright, algorithm 7.4."""
    q, found = g.clone(), []
    for s, y in reversed(pairs):
        found.append(s.dot(q) / s.dot(y))
        q -= found[-1] * y
    s, y = pairs[-1]
    q *= s.dot(y) / y.dot(y)
    for (s, y), a in zip(pairs, reversed(found), strict=True):
        q += s * (a - y.dot(q) / s.dot(y))
    return -q


def random_pairs(n, count):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    hessian = root @ root.T / n + 0.1 * torch.eye(n, dtype=torch.float64)
    gradients = torch.randn(count + 1, n, generator=generator, dtype=torch.float64)
    for before, after in itertools.pairwise(gradients):
        y = after - before
        yield torch.linalg.solve(hessian, y), y, after


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("size", [1, 4, 20])
def test_the_compact_form_is_that_of_two_loops(size, dtypes, backend):
    """With the history filling up, full, and overwritten more than once."""
    params = parameters(dtypes)
    layout, history = FlatRows(params), History(params, size)
    n, out, pairs = sum(p.numel() for p in params), rows(layout.make(1), 0), []
    for k, (s, y, g) in enumerate(random_pairs(n, 11)):
        if k == 0:
            history.begin(rows_of(layout, g - y))
        assert history.add(rows_of(layout, s), rows_of(layout, g))
        pairs = [*pairs, (s, y)][-size:]
        history.direction_(out)
        expected = two_loops(pairs, g)
        rounding = 1e-11 if dtypes == (torch.float64,) else 1e-4
        torch.testing.assert_close(flat(layout, out), expected, rtol=0, atol=rounding * len(pairs))


def test_without_pairs_the_direction_is_the_gradient():
    params = parameters()
    layout, history = FlatRows(params), History(params, 3)
    g = rows_of(layout, torch.arange(35.0, dtype=torch.float64))
    history.begin(g)
    out = rows(layout.make(1), 0)
    history.direction_(out)
    assert torch.equal(flat(layout, out), -flat(layout, g))


def filled(size=3, count=5):
    params = parameters()
    layout, history = FlatRows(params), History(params, size)
    for k, (s, y, g) in enumerate(random_pairs(35, count)):
        if k == 0:
            history.begin(rows_of(layout, g - y))
        history.add(rows_of(layout, s), rows_of(layout, g))
    return layout, history


def direction(layout, history):
    out = rows(layout.make(1), 0)
    history.direction_(out)
    return out


def test_a_history_elsewhere_gives_the_same_bits(monkeypatch):
    layout, history = filled()
    expected = bits(direction(layout, history))
    monkeypatch.setattr(History, "_is_apart", lambda self, out: True)
    assert bits(direction(layout, history)) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_a_saved_history_goes_on_with_the_same_bits(count):
    layout, history = filled(3, count)
    other = History(parameters(), 3)
    other.load_state_dict(history.state_dict())
    assert bits(direction(layout, other)) == bits(direction(layout, history))
    s, _, g = next(iter(random_pairs(35, 1)))
    for one in (history, other):
        one.add(rows_of(layout, s), rows_of(layout, g))
    assert bits(direction(layout, other)) == bits(direction(layout, history))


def test_a_history_of_another_size_or_model_is_refused():
    _, history = filled()
    for other in (History(parameters(), 4), History([torch.zeros(3)], 3)):
        with pytest.raises(ValueError, match="history of other parameters or of another history"):
            other.load_state_dict(history.state_dict())


@pytest.mark.parametrize("kind", ["negative", "nothing", "nan"])
def test_pairs_without_positive_curvature_are_forgotten(kind):
    layout, history = filled()
    s = torch.ones(35, dtype=torch.float64)
    g = flat(layout, history.gradient)
    after = {"negative": g - s, "nothing": g.clone(), "nan": g * float("nan")}[kind]
    assert history.count == 3
    assert not history.add(rows_of(layout, s), rows_of(layout, after))
    assert history.count == 0


def test_powells_damping():
    """Too little curvature becomes a fifth of that of B; enough is left as it is."""
    layout, history = filled()
    g = flat(layout, history.gradient)
    s = 0.5 * flat(layout, direction(layout, history))  # -t H g with t = 0.5
    curvature = -0.5 * s.dot(g)  # <s, B s>
    assert history.add(rows_of(layout, s), rows_of(layout, g - 0.1 * s), damping=0.5)
    newest = rows(history.matrices, 1 + 2 * history._newest + 1)
    y = flat(layout, newest)
    torch.testing.assert_close(s.dot(y), DAMPED * curvature)
    # On the line between the change of the gradient and B s = -t g.
    w = (1 - DAMPED) * curvature / (curvature + 0.1 * s.dot(s))
    torch.testing.assert_close(y, -0.1 * w * s - (1 - w) * 0.5 * g)
    torch.testing.assert_close(flat(layout, history.gradient), g - 0.1 * s)
    layout, history = filled()
    enough = g + 2 * curvature / s.dot(s) * s
    assert history.add(rows_of(layout, s), rows_of(layout, enough), damping=0.5)
    y = flat(layout, rows(history.matrices, 2 + 2 * history._newest))
    torch.testing.assert_close(y, enough - g)


def test_large_rows_are_zeros_that_can_be_written():
    layout = FlatRows([torch.zeros(300_001), torch.zeros(5).double()])
    matrices = layout.make(3)
    assert [m.shape for m in matrices] == [(3, 300_016), (3, 16)]
    assert not any(m.any() for m in matrices)
    matrices[0].fill_(1.0)
    assert matrices[0].sum() == 3 * 300_016


def test_rows_of_several_dtypes_are_one_vector():
    params = parameters((torch.float32, torch.float64, torch.bfloat16))
    layout = FlatRows(params)
    values = torch.arange(35.0, dtype=torch.float64)
    row = rows_of(layout, values)
    assert [m.dtype for m in row] == [torch.float32, torch.float64, torch.float32]
    assert all(len(m) % 16 == 0 for m in row) and largest(row).item() == 34
    assert torch.equal(flat(layout, row), values)
    found = products([m[None] for m in row], row, [2 * m for m in row])
    assert found[:, 0].tolist() == [values.dot(values).item(), 2 * values.dot(values).item()]
    out = rows(layout.make(1), 0)
    combine_(out, [torch.stack([m, m]) for m in row], torch.tensor([2.0, 1.0]).double())
    assert torch.equal(flat(layout, out), 3 * values)
