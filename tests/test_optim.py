"""FullBatchGD against torch.optim.SGD and clip_grad_norm_, and as a torch optimizer."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import bits, use_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt._engine import reduce

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((), (5,), (0, 3), (3, 4), (2, 3, 2, 2))
SGD = torch.optim.SGD


def parameters(dtype: torch.dtype = torch.float64, shapes=SHAPES, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in shapes
    ]


def twins(params: list[Parameter]) -> list[Parameter]:
    """Copies that share no memory, with the same strides."""
    copies = []
    for p in params:
        twin = Parameter(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype))
        twin.data.copy_(p.data)
        copies.append(twin)
    return copies


@functools.cache
def gradients(step: int, shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def set_gradients(step: int, *lists: list[Parameter]) -> None:
    """Give every list the same gradients, drawn from the step."""
    drawn = gradients(step, tuple(p.shape for p in lists[0]))
    for params in lists:
        for p, g in zip(params, drawn, strict=True):
            p.grad = g.to(p.dtype, copy=True)


def sgd_step(
    optimizer: SGD, max_norm: float | None = None, norm_type: float = 2.0
) -> Tensor | None:
    """The step to match: torch's clip, then torch's SGD."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = None
    if max_norm is not None:
        filled = [p for p in params if p.numel()]  # torch has no maximum over an empty tensor
        norm = nn.utils.clip_grad_norm_(filled, max_norm, norm_type)
    optimizer.step()
    return norm


def assert_near(found, expected, tolerance: float = 1e-12) -> None:
    """Equal to a tolerance relative to the largest element of each tensor."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = max(b.abs().max().item(), 1e-30) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def velocities(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["momentum_buffer"] for p in params if optimizer.state[p]]


# --- the same as torch, for every combination of options -----------------------------------------

MOMENTA = [(0, 0, False), (0, 0.3, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)]
RULES = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    for (momentum, dampening, nesterov), weight_decay, maximize in itertools.product(
        MOMENTA, (0, 5e-4), (False, True)
    )
]
CLIPS = [{"max_norm": None, "norm_type": 2.0}] + [
    {"max_norm": m, "norm_type": p} for m, p in itertools.product((0.25, 1e6), (2.0, math.inf, 1.0))
]
LEARNING_RATES = {"float": 0.1, "tensor": torch.tensor(0.1, dtype=torch.float64)}


def name(options: dict) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items())


def hundred_steps(rule: dict, clip: dict, lr: float | Tensor, steps: int = 100) -> None:
    ours = parameters(shapes=[(), (3, 4), (2, 3, 2, 2)])
    theirs = twins(ours)
    a = FullBatchGD(ours, lr=lr, **rule, **clip)
    b = SGD(theirs, lr=lr, foreach=False, **rule)
    for step in range(steps):
        set_gradients(step, ours, theirs)
        a.step()
        norm = sgd_step(b, **clip)
        if norm is not None:
            torch.testing.assert_close(a.last_grad_norm, norm, rtol=1e-12, atol=0)
    assert_near(ours, theirs)
    assert_near(velocities(a), velocities(b))


@pytest.mark.parametrize("clip", CLIPS, ids=name)
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_hundred_steps_equal_sgd_and_clip(rule, clip):
    """Learning rates that are numbers and tensors take turns."""
    kinds = list(LEARNING_RATES.values())
    hundred_steps(rule, clip, kinds[(RULES.index(rule) + CLIPS.index(clip)) % 2])


@pytest.mark.parametrize("clip", [CLIPS[0], CLIPS[1]], ids=name)
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_plain_torch_back_end_equals_sgd_and_clip(rule, clip, monkeypatch):
    use_backend("reference", monkeypatch)
    hundred_steps(rule, clip, 0.1, steps=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 1e9], ids=["unclipped", "below max_norm"])
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_bit_for_bit_equal_to_sgd_without_clipping(rule, max_norm, dtype, kernels):
    """Holds where torch's own CPU kernels use fused multiply-add: AVX2 and AVX-512."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch rounds twice here, the kernels once")
    shapes = [(), (1,), (7,), (33,), (64, 3, 3, 3), (1025, 33)]
    ours = parameters(dtype, shapes)
    theirs = twins(ours)
    a = FullBatchGD(ours, lr=0.1, max_norm=max_norm, **rule)
    b = SGD(theirs, lr=0.1, foreach=False, **rule)
    for step in range(5):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
    assert bits(ours, velocities(a)) == bits(theirs, velocities(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES[-4:] + RULES[:4], ids=name)
def test_half_precision_is_computed_in_float32_and_rounded_once(rule, dtype, backend):
    """From the same state, a step is SGD's in float32, up to one unit in the last place."""
    params = parameters(dtype, [(), (5,), (17, 31)])
    optimizer = FullBatchGD(params, lr=0.1, max_norm=2.0, **rule)
    for step in range(4):
        set_gradients(step, params)
        wide = [Parameter(p.detach().float()) for p in params]
        for w, p in zip(wide, params, strict=True):
            w.grad = p.grad.float()
        model = SGD(wide, lr=0.1, foreach=False, **rule)
        if step and rule["momentum"]:
            for w, p in zip(wide, params, strict=True):
                buffer = optimizer.state[p]["momentum_buffer"]
                model.state[w]["momentum_buffer"] = buffer.float()
        norm = sgd_step(model, max_norm=2.0)
        optimizer.step()
        assert optimizer.last_grad_norm.dtype == torch.float32
        torch.testing.assert_close(optimizer.last_grad_norm, norm, rtol=1e-6, atol=0)
        unit = torch.finfo(dtype).eps
        for p, w in zip(params, wide, strict=True):
            assert p.dtype == dtype
            torch.testing.assert_close(p.float(), w.detach(), rtol=unit, atol=1e-6)
            if rule["momentum"]:
                assert optimizer.state[p]["momentum_buffer"].dtype == dtype


@st.composite
def strided(draw) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """A shape, an order of its dimensions in memory, and whether there are gaps between rows."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    return shape, order, draw(st.booleans())


def lay_out(values: Tensor, order: tuple[int, ...], gaps: bool) -> Tensor:
    """The same values in another memory order, with gaps if wanted."""
    inner = values.permute(order)
    wide = torch.full([2 * n for n in inner.shape], float("nan"), dtype=values.dtype)
    held = wide[tuple(slice(0, n) for n in inner.shape)] if gaps else wide.new_empty(inner.shape)
    held.copy_(inner)
    return held.permute([order.index(i) for i in range(len(order))])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layouts=st.lists(strided(), min_size=1, max_size=4),
    gradient_layouts=st.lists(st.booleans(), min_size=4, max_size=4),
    lr=st.floats(1e-4, 1.0),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 1e-2]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    max_norm=st.none() | st.floats(1e-3, 1e3),
    norm_type=st.sampled_from([1.0, 2.0, 3.0, math.inf]),
    reference=st.booleans(),
)
def test_any_shapes_strides_and_options(
    layouts, gradient_layouts, lr, momentum, nesterov, max_norm, norm_type, reference, **rule
):
    nesterov = nesterov and momentum > 0 and rule["dampening"] == 0
    rule |= {"momentum": momentum, "nesterov": nesterov}
    generator = torch.Generator().manual_seed(len(layouts))
    ours, theirs = [], []
    for shape, order, gaps in layouts:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        ours.append(Parameter(lay_out(values, order, gaps)))
        theirs.append(Parameter(values.clone()))
    with pytest.MonkeyPatch.context() as patch:
        if reference:
            use_backend("reference", patch)
        a = FullBatchGD(ours, lr, max_norm=max_norm, norm_type=norm_type, **rule)
        b = SGD(theirs, lr, foreach=False, **rule)
        for step in range(4):
            set_gradients(step, theirs)
            for p, q, (_, order, gaps), same in zip(
                ours, theirs, layouts, gradient_layouts, strict=False
            ):
                p.grad = lay_out(q.grad, order, gaps) if same else q.grad.clone()
            a.step()
            sgd_step(b, max_norm, norm_type)
    assert_near(ours, theirs, 1e-11)


# --- odd tensors ---------------------------------------------------------------------------------


def odd_parameters() -> dict[str, list[Parameter]]:
    base = torch.arange(60.0).reshape(6, 10) / 60
    image = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    tiny = [Parameter(torch.full((i % 5,), 0.5)) for i in range(1000)]
    return {
        "0-dim": [Parameter(torch.tensor(1.5))],
        "empty": [
            Parameter(torch.empty(0)),
            Parameter(torch.empty(2, 0)),
            Parameter(torch.ones(2)),
        ],
        "only empty": [Parameter(torch.empty(0))],
        "transposed": [Parameter(base.clone().t())],
        "with gaps": [Parameter(base.clone()[:4, :3])],
        "every other column": [Parameter(base.clone()[:, ::2])],
        "channels_last": [Parameter(image.to(memory_format=torch.channels_last))],
        "1,000 tiny": tiny,
    }


@pytest.mark.parametrize("kind", odd_parameters())
def test_odd_tensors(kind, backend):
    ours = odd_parameters()[kind]
    theirs = [Parameter(p.detach().clone()) for p in ours]
    strides, where = [p.stride() for p in ours], [p.data_ptr() for p in ours]
    rule = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    a, b = FullBatchGD(ours, max_norm=0.5, **rule), SGD(theirs, **rule)
    for step in range(3):
        set_gradients(step, ours, theirs)
        a.step()
        sgd_step(b, 0.5)
    assert_near(ours, theirs, 1e-6)
    assert strides == [p.stride() for p in ours] and where == [p.data_ptr() for p in ours]


def test_gaps_between_elements_are_not_written(backend):
    base = torch.full((6, 10), 7.0)
    p = Parameter(base[:4, :3])
    optimizer = FullBatchGD([p], lr=1.0, momentum=0.9)
    for _ in range(2):
        p.grad = torch.ones(4, 3)
        optimizer.step()
    untouched = torch.ones_like(base, dtype=torch.bool)
    untouched[:4, :3] = False
    assert torch.equal(p.detach(), torch.full((4, 3), 7 - 1 - 1.9)) and (base[untouched] == 7).all()


def test_interleaved_parameters_do_not_overlap():
    base = torch.zeros(8)
    even, odd = Parameter(base[::2]), Parameter(base[1::2])
    optimizer = FullBatchGD([even, odd], lr=1.0)
    even.grad, odd.grad = torch.ones(4), -torch.ones(4)
    optimizer.step()
    assert base.tolist() == [-1.0, 1.0] * 4


def test_mixed_dtypes_share_one_norm(backend):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ours = [parameters(d, [(6, 7)], seed=i)[0] for i, d in enumerate(dtypes)]
    set_gradients(0, ours)
    squares = sum(p.grad.double().square().sum() for p in ours)
    before = [p.detach().clone().double() for p in ours]
    grads = [p.grad.double() for p in ours]
    optimizer = FullBatchGD(ours, lr=0.5, max_norm=1.0)
    optimizer.step()
    assert optimizer.last_grad_norm.dtype == torch.float64
    torch.testing.assert_close(optimizer.last_grad_norm, squares.sqrt(), rtol=1e-6, atol=0)
    for p, old, g in zip(ours, before, grads, strict=True):
        expected = (old - 0.5 * g / (squares.sqrt() + 1e-6)).to(p.dtype)
        unit = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.detach(), expected, rtol=2 * unit, atol=unit)


def test_parameters_without_gradients_are_skipped():
    used, unused, frozen = parameters(shapes=[(3,), (3,), (3,)])
    frozen.requires_grad_(False)
    optimizer = FullBatchGD([used, unused, frozen], lr=0.1, momentum=0.9, weight_decay=0.1)
    before = bits(unused, frozen)
    for _ in range(2):
        used.grad = torch.ones_like(used)
        optimizer.step()
    assert bits(unused, frozen) == before
    assert not optimizer.state[unused] and not optimizer.state[frozen]
    assert optimizer.last_grad_norm.item() == pytest.approx(math.sqrt(3))
    # Its buffer starts when its first gradient comes, as in SGD.
    unused.grad = torch.ones_like(unused)
    expected = unused.detach() - 0.1 * (1 + 0.1 * unused.detach())
    optimizer.step()
    torch.testing.assert_close(unused.detach(), expected)


def test_no_gradient_at_all_changes_nothing():
    params = parameters()
    optimizer = FullBatchGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, max_norm=1.0)
    before = bits(params)
    assert optimizer.step() is None
    assert bits(params) == before and optimizer.last_grad_norm.item() == 0


def test_nonfinite_gradients_pass_as_in_torch():
    for value, max_norm in itertools.product((math.nan, math.inf), (None, 1.0)):
        ours = parameters(torch.float32, [(4,), (3,)])
        theirs = twins(ours)
        a, b = FullBatchGD(ours, lr=0.1, max_norm=max_norm), SGD(theirs, lr=0.1)
        set_gradients(0, ours, theirs)
        for members in (ours, theirs):
            members[0].grad[1] = value
        a.step()
        sgd_step(b, max_norm)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, equal_nan=True)
        assert not torch.isfinite(a.last_grad_norm)


# --- it is a torch optimizer ---------------------------------------------------------------------

TRAINED = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def pair_of_optimizers(
    make: Callable = lambda p, **kw: SGD(p, foreach=False, **kw),
) -> tuple[FullBatchGD, torch.optim.Optimizer]:
    ours = parameters()
    return FullBatchGD(ours, **TRAINED), make(twins(ours), **TRAINED)


def members(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(*optimizers: torch.optim.Optimizer, steps: int = 5, start: int = 0) -> None:
    for step in range(start, start + steps):
        set_gradients(step, *map(members, optimizers))
        for optimizer in optimizers:
            optimizer.step()


def training(optimizer: torch.optim.Optimizer) -> list:
    """Parameters and momentum, bit for bit."""
    return bits(members(optimizer), velocities(optimizer))


def options(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The groups' options; torch gives optimizers that were pickled one that they had not."""
    hidden = ("params", "differentiable")
    return [{k: v for k, v in g.items() if k not in hidden} for g in optimizer.param_groups]


def assert_same_training(a, b, tolerance: float = 1e-13) -> None:
    train(a, b, start=50)
    assert_near(members(a), members(b), tolerance)
    assert_near(velocities(a), velocities(b), tolerance)


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dict_moves_to_and_from_sgd_during_training(ours_first):
    a, b = pair_of_optimizers()
    source, target = (a, b) if ours_first else (b, a)
    train(source)
    for p, q in zip(members(target), members(source), strict=True):
        p.data.copy_(q.data)
    target.load_state_dict(copy.deepcopy(source.state_dict()))  # torch would share the buffers
    assert_same_training(a, b)


def test_state_dict_of_ours_goes_to_sgd_in_all_its_forms():
    for form in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        a, b = pair_of_optimizers(lambda p, form=form, **kw: SGD(p, **form, **kw))
        train(a, b)
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        a.load_state_dict(copy.deepcopy(b.state_dict()))
        assert_same_training(a, b)


def test_max_norm_survives_a_state_dict_of_sgd():
    ours = parameters()
    theirs = twins(ours)
    a = FullBatchGD(ours, max_norm=0.3, norm_type=1.0, error_if_nonfinite=True, **TRAINED)
    b = SGD(theirs, **TRAINED)
    train(b)
    a.load_state_dict(b.state_dict())
    group = a.param_groups[0]
    clip = (group["max_norm"], group["norm_type"], group["error_if_nonfinite"])
    assert clip == (0.3, 1.0, True)
    assert group["lr"] == 0.1
    set_gradients(0, ours)
    before = [p.detach().clone() for p in ours]
    a.param_groups[0].update(momentum=0, nesterov=False, weight_decay=0)
    a.step()
    moved = sum((p - q).abs().sum() for p, q in zip(ours, before, strict=True))
    assert moved.item() == pytest.approx(0.1 * 0.3, rel=1e-5)


def test_state_dict_of_ours_carries_the_clip():
    a = FullBatchGD(parameters(), lr=0.1, max_norm=0.3)
    b = FullBatchGD(parameters(), lr=0.1)
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["max_norm"] == 0.3


def test_old_sgd_state_with_none_for_a_buffer():
    ours = parameters()
    theirs = twins(ours)
    plain = SGD(theirs, lr=0.1)
    state = plain.state_dict()
    state["state"] = {i: {"momentum_buffer": None} for i in range(len(SHAPES))}
    a, b = FullBatchGD(ours, **TRAINED), SGD(theirs, **TRAINED)
    for optimizer in (a, b):
        optimizer.load_state_dict(copy.deepcopy(state))
        optimizer.param_groups[0].update(TRAINED)
    train(a, b)
    assert_near(ours, theirs)


ROUND_TRIPS = {
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_copies_of_the_optimizer_go_on_identically(way):
    a = FullBatchGD(parameters(), max_norm=0.5, **TRAINED)
    train(a)
    b = ROUND_TRIPS[way](a)
    assert type(b) is FullBatchGD and options(a) == options(b)
    b.last_grad_norm  # noqa: B018  (it is there)
    train(a, b, start=50)
    assert training(a) == training(b)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_torch_save_and_load_with_weights_only(lr):
    a = FullBatchGD(parameters(), max_norm=0.5, norm_type=math.inf, **{**TRAINED, "lr": lr})
    train(a)
    b = FullBatchGD(twins(members(a)), lr=1.0)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    train(a, b, start=50)
    assert training(a) == training(b)


def test_parameter_groups_with_their_own_options():
    ours = parameters(shapes=[(4,), (5,), (6,)])
    theirs = twins(ours)
    per_group = [
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.2, "weight_decay": 0.1},
        {"momentum": 0.5, "dampening": 0.2, "maximize": True},
    ]
    a = FullBatchGD(
        [{"params": [p], **o} for p, o in zip(ours, per_group, strict=True)], 0.3, max_norm=0.5
    )
    b = SGD([{"params": [p], **o} for p, o in zip(theirs, per_group, strict=True)], 0.3)
    for step in range(10):
        set_gradients(step, ours, theirs)
        a.step()
        sgd_step(b, 0.5)
    assert_near(ours, theirs)


def test_a_group_added_during_training():
    ours = parameters(shapes=[(4,), (5,)])
    theirs = twins(ours)
    a, b = FullBatchGD(ours[:1], max_norm=0.5, **TRAINED), SGD(theirs[:1], **TRAINED)
    for step in range(6):
        if step == 3:
            a.add_param_group({"params": ours[1:], "lr": 0.01})
            b.add_param_group({"params": theirs[1:], "lr": 0.01})
        set_gradients(step, ours, theirs)
        a.step()
        sgd_step(b, 0.5)
    assert_near(ours, theirs)


def test_named_parameters():
    model = nn.Linear(3, 2)
    a = FullBatchGD(model.named_parameters(), **TRAINED)
    b = SGD(copy.deepcopy(model).named_parameters(), **TRAINED)
    train(a, b)
    assert a.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert_near(members(a), members(b), 1e-6)
    b.load_state_dict(a.state_dict())


def test_step_and_state_dict_hooks():
    a = FullBatchGD(parameters(), **TRAINED)
    seen = []
    a.register_step_pre_hook(lambda *args: seen.append("pre"))
    a.register_step_post_hook(lambda *args: seen.append("post"))
    a.register_state_dict_pre_hook(lambda *args: seen.append("saving"))
    a.register_state_dict_post_hook(lambda _, state: state.update(extra=1))
    a.register_load_state_dict_pre_hook(lambda *args: seen.append("loading"))
    a.register_load_state_dict_post_hook(lambda *args: seen.append("loaded"))
    train(a, steps=1)
    state = a.state_dict()
    a.load_state_dict(state)
    assert seen == ["pre", "post", "saving", "loading", "loaded"] and state["extra"] == 1


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "LambdaLR with numpy": lambda o: torch.optim.lr_scheduler.LambdaLR(
        o, lambda t: np.float32(1 / (t + 1))
    ),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=12),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_reach_it(kind, tensor_lr):
    if kind == "LambdaLR with numpy" and tensor_lr:
        pytest.skip("torch itself does not fill a tensor with a numpy scalar")
    ours = parameters()
    theirs = twins(ours)

    def rate():
        return torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1

    a = FullBatchGD(ours, **{**TRAINED, "lr": rate()})
    b = SGD(theirs, **{**TRAINED, "lr": rate()}, foreach=False)
    both = SCHEDULERS[kind](a), SCHEDULERS[kind](b)
    rates = set()
    for step in range(10):
        train(a, b, steps=1, start=step)
        for scheduler in both:
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
        assert float(a.param_groups[0]["lr"]) == float(b.param_groups[0]["lr"])
        assert a.param_groups[0]["momentum"] == b.param_groups[0]["momentum"]
        rates.add((float(a.param_groups[0]["lr"]), a.param_groups[0]["momentum"]))
    assert len(rates) > 2
    assert_near(ours, theirs)


@pytest.mark.parametrize("lr", [np.float32(0.1), np.float64(0.1), np.int64(1), 1], ids=repr)
def test_numpy_scalars_are_numbers(lr):
    ours = parameters()
    theirs = twins(ours)
    train(a := FullBatchGD(ours, lr=lr), b := SGD(theirs, lr=float(lr)))
    assert_near(members(a), members(b))


def test_tensor_lr_changed_in_place_is_seen():
    lr = torch.tensor(0.1)
    a = FullBatchGD([p := Parameter(torch.zeros(1))], lr=lr)
    p.grad = torch.ones(1)
    a.step()
    lr.fill_(1.0)
    a.step()
    assert p.item() == pytest.approx(-1.1)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr_of_one_element(shape):
    a = FullBatchGD([p := Parameter(torch.zeros(1))], lr=torch.full(shape, 0.5))
    p.grad = torch.ones(1)
    a.step()
    assert p.item() == -0.5


def test_autograd_sees_the_update():
    """A backward pass through values that the step has replaced raises, as with SGD."""
    for make in (SGD, FullBatchGD):
        p = Parameter(torch.ones(3))
        loss = (p * p).sum()
        p.grad = torch.ones(3)
        version = p._version
        make([p], lr=0.1).step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_autograd_sees_the_momentum_buffer_change():
    p = Parameter(torch.ones(3))
    a = FullBatchGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    a.step()
    version = a.state[p]["momentum_buffer"]._version
    a.step()
    assert a.state[p]["momentum_buffer"]._version > version
    assert not a.state[p]["momentum_buffer"].requires_grad


def test_gradients_are_left_as_they_were():
    """Clipping, weight decay and maximize do not write to p.grad."""
    params = parameters()
    a = FullBatchGD(params, max_norm=1e-3, maximize=True, **TRAINED)
    set_gradients(0, params)
    before, where = bits([p.grad for p in params]), [p.grad.data_ptr() for p in params]
    a.step()
    assert bits([p.grad for p in params]) == before
    assert where == [p.grad.data_ptr() for p in params]


# --- last_grad_norm, and nothing read on the host ------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_last_grad_norm(dtype, norm_type, backend):
    params = parameters(dtype)
    a = FullBatchGD(params, lr=0.1, norm_type=norm_type)
    assert a.last_grad_norm is None
    set_gradients(0, params)
    flat = torch.cat([p.grad.double().reshape(-1) for p in params])
    a.step()
    norm = a.last_grad_norm
    assert isinstance(norm, Tensor) and norm.dim() == 0 and norm.device == params[0].device
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        norm.double(), torch.linalg.vector_norm(flat, norm_type), rtol=1e-6, atol=0
    )


def test_last_grad_norm_is_of_all_groups():
    params = parameters(shapes=[(2,), (2,)])
    a = FullBatchGD([{"params": [p]} for p in params], lr=0.1)
    params[0].grad, params[1].grad = torch.full((2,), 3.0).double(), torch.full((2,), 4.0).double()
    a.step()
    assert a.last_grad_norm.item() == pytest.approx(math.sqrt(50))


READS = ("item", "__float__", "__bool__", "__int__", "__index__", "tolist", "numpy", "cpu")


def forbid_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, *args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    for method in READS:
        monkeypatch.setattr(Tensor, method, refuse)
    monkeypatch.setattr(reduce, "_lie_on_host", lambda *values: False)  # as on a GPU


@pytest.mark.parametrize("lr", LEARNING_RATES)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_step_reads_nothing_on_the_host(lr, norm_type, backend, monkeypatch):
    params = parameters(torch.float32)
    rate = LEARNING_RATES[lr]
    a = FullBatchGD(params, max_norm=0.5, norm_type=norm_type, **{**TRAINED, "lr": rate})
    for step in range(3):
        set_gradients(step, params)
        with monkeypatch.context() as patch:
            forbid_reads(patch)
            a.step()


@pytest.mark.parametrize("method", ["forward", "central", "exact", None])
def test_step_with_a_closure_reads_nothing_on_the_host(method, backend, monkeypatch):
    model, chunks = small_model(torch.float32), small_data(torch.float32)
    a = FullBatchGD(model.parameters(), max_norm=0.5, **TRAINED)
    penalty = method and GradientPenalty(method=method, coefficient=0.1)
    closure = FullBatchClosure(model, nn.functional.mse_loss, chunks, penalty=penalty)
    for _ in range(2):
        with monkeypatch.context() as patch:
            forbid_reads(patch)
            a.step(closure)


# --- closures ------------------------------------------------------------------------------------


def small_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def small_data(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(20, 2, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(x.split(8), y.split(8), strict=True))


def small_closure(model: nn.Module, chunks=None, **options) -> FullBatchClosure:
    dtype = next(model.parameters()).dtype
    chunks = small_data(dtype) if chunks is None else chunks
    return FullBatchClosure(model, nn.functional.mse_loss, chunks, **options)


def test_plain_closure():
    """A function that calls backward, with gradients switched on for it; its value is returned."""
    model = small_model()
    a = FullBatchGD(model.parameters(), lr=0.1, max_norm=0.5)
    x, y = small_data()[0]
    losses = []

    def closure():
        assert torch.is_grad_enabled()
        a.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():
        assert a.step(closure) is losses[0]
    assert a.step(closure) is losses[1] and losses[1] < losses[0]
    assert a.step(lambda: "anything") == "anything"


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_are_stepped_on_as_p_grad_would_be(dtype, max_norm, norm_type, backend):
    """A FullBatchClosure, whose sums are read directly, against one wrapped in a function."""
    options = {**TRAINED, "max_norm": max_norm, "norm_type": norm_type}
    models = small_model(dtype), small_model(dtype)
    penalty = GradientPenalty(coefficient=0.05)
    closures = [small_closure(m, penalty=penalty) for m in models]
    a, b = (FullBatchGD(m.parameters(), **options) for m in models)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for _ in range(10):
        first, second = a.step(closures[0]), b.step(lambda: closures[1]())
        torch.testing.assert_close(first, second, rtol=tolerance, atol=0)
        torch.testing.assert_close(a.last_grad_norm, b.last_grad_norm, rtol=tolerance, atol=0)
        assert_near([p.grad for p in members(a)], [p.grad for p in members(b)], tolerance)
    assert_near(members(a), members(b), tolerance)
    assert_near(velocities(a), velocities(b), tolerance)


def test_step_with_a_closure_equals_sgd_and_clip_on_the_whole_batch():
    models = small_model(), small_model()
    chunks = small_data()
    x, y = (torch.cat(part) for part in zip(*chunks, strict=True))
    a = FullBatchGD(models[0].parameters(), max_norm=0.3, **TRAINED)
    b = SGD(models[1].parameters(), **TRAINED)
    closure = small_closure(models[0], chunks)
    for _ in range(20):
        loss = a.step(closure)
        b.zero_grad()
        whole = nn.functional.mse_loss(models[1](x), y)
        whole.backward()
        sgd_step(b, 0.3)
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
    assert_near(members(a), members(b))


def test_p_grad_is_the_mean_and_not_clipped(backend):
    model, twin = small_model(), small_model()
    a = FullBatchGD(model.parameters(), max_norm=1e-3, **TRAINED)
    loss = a.step(small_closure(model))
    expected = small_closure(twin)()
    assert loss == expected and not loss.requires_grad
    assert_near([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    norm = torch.cat([p.grad.reshape(-1) for p in twin.parameters()]).norm()
    torch.testing.assert_close(a.last_grad_norm, norm)


def test_an_optimizer_of_some_of_the_closure_s_parameters(backend):
    """It steps on its own; the others get their mean gradient, and are not part of the norm."""
    model, twin = small_model(), small_model()
    a = FullBatchGD(model[2].parameters(), lr=0.1, momentum=0.9, max_norm=0.05)
    b = SGD(twin[2].parameters(), lr=0.1, momentum=0.9)
    closures = small_closure(model), small_closure(twin)
    for _ in range(3):
        a.step(closures[0])
        closures[1]()
        grads = [p.grad.clone() for p in twin.parameters()]
        norm = sgd_step(b, 0.05)
        torch.testing.assert_close(a.last_grad_norm, norm, rtol=1e-12, atol=0)
        assert_near([p.grad for p in model.parameters()], grads)
    assert_near(model.parameters(), twin.parameters())


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
def test_parameters_with_gradients_of_their_own_are_stepped_on_without_the_closure(
    norm_type, backend
):
    model, twin = small_model(), small_model()
    outside = parameters(shapes=[(3,), (2, 2), (4,)])
    twins_outside = twins(outside)
    options = {"lr": 0.1, "momentum": 0.9}
    a = FullBatchGD([*outside, *model.parameters()], max_norm=0.5, norm_type=norm_type, **options)
    b = SGD([*twins_outside, *twin.parameters()], **options)
    closures = small_closure(model), small_closure(twin)
    for step in range(4):
        set_gradients(step, outside[:2], twins_outside[:2])
        with pytest.raises(ValueError, match=r"3 parameters.*never be trained.*params\[0\] \[3\]"):
            a.step(closures[0])
        closures[0]()
        a.step()
        closures[1]()
        norm = sgd_step(b, 0.5, norm_type)
        torch.testing.assert_close(a.last_grad_norm, norm, rtol=1e-12, atol=0)
    assert_near(members(a), members(b))


def test_parameters_that_no_chunk_used_are_skipped():
    model = small_model()
    model.register_parameter("unused", Parameter(torch.ones(3).double()))
    before = bits(model.unused)
    a = FullBatchGD(model.parameters(), **TRAINED)
    a.step(small_closure(model))
    assert bits(model.unused) == before and model.unused.grad is None
    assert not a.state[model.unused]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_get_their_gradient_in_float32(dtype, backend):
    """A sum below half precision's resolution still moves the parameter."""
    p = Parameter(torch.zeros(2, dtype=dtype))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = p

    gradients = [1.0, 2**-12, 2**-12, 2**-12]
    chunks = [torch.full((1,), g, dtype=dtype) for g in gradients]
    closure = FullBatchClosure(Two(), None, chunks, evaluate=lambda m, c: (m.p * c).sum())
    a = FullBatchGD([p], lr=1.0)
    a.step(closure)
    mean = (1 + 3 * 2**-12) / 4
    assert a.last_grad_norm.dtype == torch.float32
    assert a.last_grad_norm.item() == pytest.approx(mean * math.sqrt(2), rel=1e-7)
    assert p.grad.dtype == dtype and p.dtype == dtype
    torch.testing.assert_close(p.detach(), torch.full((2,), -mean).to(dtype), rtol=0, atol=0)


def test_half_precision_adds_small_chunks_up():
    """Chunks that bfloat16 sums would lose: 1 + 256 times 2^-9 is 1.5, not 1."""
    p = Parameter(torch.zeros(1, dtype=torch.bfloat16))

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = p

    chunks = [torch.full((1,), g, dtype=torch.bfloat16) for g in [1.0] + 256 * [2**-9]]
    closure = FullBatchClosure(One(), None, chunks, evaluate=lambda m, c: (m.p * c).sum())
    FullBatchGD([p], lr=float(len(chunks))).step(closure)
    assert p.item() == -1.5


def test_a_failing_plain_closure_changes_nothing():
    a = FullBatchGD(parameters(), **TRAINED)
    train(a)
    before = bits(a)
    with pytest.raises(ZeroDivisionError):
        a.step(lambda: 1 / 0)
    assert bits(a) == before


# --- GradScaler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_is_refused_and_leaves_no_trace(unscale):
    a = FullBatchGD(parameters(torch.float32), **TRAINED)
    train(a)
    b = copy.deepcopy(a)
    before = bits(a)
    scaler = torch.amp.GradScaler("cpu")
    loss = sum((p * p).sum() for p in members(a))
    a.zero_grad()
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(a)
    with pytest.raises(RuntimeError, match=r"GradScaler.*bfloat16"):
        scaler.step(a)
    assert bits(a) == before and not {"grad_scale", "found_inf"} & vars(a).keys()
    train(a, b, start=50)
    assert training(a) == training(b)


def test_a_grad_scaler_that_is_switched_off_is_welcome():
    params = parameters(torch.float32)
    a = FullBatchGD(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    before = bits(params)
    scaler.step(a)
    scaler.update()
    assert bits(params) != before
