"""The exact penalty is right or refused: functions whose second derivative torch would lose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fbopt import FullBatchClosure, GradientPenalty

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ("exact", "central")


class Cube(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


class MarkedCube(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


class MarkedInside(Cube):
    """As with mixed precision: another decorator around it."""

    forward = staticmethod(torch.amp.custom_fwd(Cube.forward, device_type="cpu"))
    backward = staticmethod(torch.amp.custom_bwd(MarkedCube.backward, device_type="cpu"))


class DetachedCube(Cube):
    """As the adjoint method for differential equations."""

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return 3 * g * ctx.saved_tensors[0] ** 2


class LeafCube(Cube):
    """The result requires grad, but comes from nowhere."""

    @staticmethod
    def backward(ctx, g):
        return DetachedCube.backward(ctx, g).requires_grad_()


class FusedLoss(Function):
    """As fused losses of large vocabularies: the gradient is computed in the forward pass."""

    @staticmethod
    def forward(ctx, output, target):
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            loss = F.mse_loss(leaf, target)
            (ctx.grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    def backward(ctx, g):
        return ctx.grad * g, None


class Scale(Function):
    """Linear: its backward pass needs no graph where the vector has none."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad() if not g.requires_grad else torch.enable_grad():
            return 3 * g


class Round(Function):
    """Its derivative is zero, and so is the second one."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def model_with(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 2)).double()


def closure_of(model, method, loss_fn=F.mse_loss) -> FullBatchClosure:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    chunks = list(zip(x.split(4), x[:, :2].cos().split(4), strict=True))
    penalty = GradientPenalty(coefficient=1.0, radius=1e-5, method=method)
    return FullBatchClosure(model, loss_fn, chunks, penalty=penalty)


def gradient_of(closure) -> Tensor:
    closure()
    return torch.cat([p.grad.flatten() for p in closure.model.parameters()])


BATCHNORM_AND_DROPOUT = (nn.BatchNorm1d(6), nn.Dropout(0.3))
LOST = {
    "once_differentiable": (MarkedCube.apply, F.mse_loss, "MarkedCube is marked once"),
    "once_differentiable, decorated": (MarkedInside.apply, F.mse_loss, "MarkedInside is marked"),
    "no graph": (DetachedCube.apply, F.mse_loss, "backward pass of DetachedCube leaves no graph"),
    "no graph, a leaf": (LeafCube.apply, F.mse_loss, "LeafCube leaves no graph"),
    "a loss function without graph": (torch.tanh, FusedLoss.apply, "FusedLoss leaves no graph"),
    "a loss under a linear function": (
        torch.tanh,
        lambda output, target: Scale.apply(FusedLoss.apply(output, target)),
        "FusedLoss leaves no graph",
    ),
}


@pytest.mark.parametrize("function, loss_fn, match", LOST.values(), ids=LOST)
def test_what_loses_the_second_derivative_is_refused(function, loss_fn, match):
    model = model_with(Apply(function), *BATCHNORM_AND_DROPOUT)
    closure = closure_of(model, "exact", loss_fn)
    before = bits(model, torch.get_rng_state())
    for _ in range(2):
        torch.set_rng_state(torch.tensor(list(before[1][-1]), dtype=torch.uint8))
        with pytest.raises(RuntimeError, match=rf"method='exact'.*{match}.*use method='forward'"):
            closure()
        assert bits(model) == before[:1] and closure.step == 0
    assert gradient_of(closure_of(model, "forward", loss_fn)).isfinite().all()


RIGHT = {
    "differentiable twice": (Cube.apply, F.mse_loss),
    "zero": (lambda x: x + Round.apply(x), F.mse_loss),
    "linear": (Scale.apply, F.mse_loss),
    "linear at the end": (
        torch.tanh,
        lambda output, target: Scale.apply(F.mse_loss(output, target)),
    ),
    "jumps": (torch.relu, F.mse_loss),
    "checkpoint": (lambda x: checkpoint(torch.tanh, x, use_reentrant=False), F.mse_loss),
}


@pytest.mark.parametrize("function, loss_fn", RIGHT.values(), ids=RIGHT)
def test_what_keeps_the_second_derivative_is_not(function, loss_fn):
    found = [gradient_of(closure_of(model_with(Apply(function)), m, loss_fn)) for m in METHODS]
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)


def test_the_check_leaves_draws_and_statistics_alone():
    """A custom loss has a second pass at another point, which must not be seen."""

    def loss_fn(output, target):
        return Scale.apply(F.mse_loss(output, target))

    found = []
    for loss in (loss_fn, lambda output, target: 3 * F.mse_loss(output, target)):
        model = model_with(*BATCHNORM_AND_DROPOUT)
        torch.manual_seed(3)
        gradient = gradient_of(closure_of(model, "exact", loss))
        found.append((gradient, model.state_dict(), torch.rand(2)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "make", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "new"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weight_norm(make):
    """Torch's fused weight_norm takes the norm for a constant in its second derivative."""
    model = model_with(nn.Tanh(), make(nn.Linear(6, 6)))
    with pytest.raises(RuntimeError, match=r"wrongly for weight_norm.*method='forward'"):
        closure_of(model, "exact")()
    closure_of(model, "central")()


def test_an_operation_without_second_derivative_names_the_methods():
    model = model_with(Apply(lambda x: F.embedding_bag(torch.arange(len(x))[:, None], x)))
    with pytest.raises(RuntimeError, match=r"exact.*_embedding_bag.*use method='forward'"):
        closure_of(model, "exact")()


class Checkpointed(nn.Module):
    """Its first layer is checkpointed; the input requires grad, as trainers arrange it."""

    def __init__(self, before: bool):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(4, 4) if before else nn.Identity()
        self.inside, self.after = nn.Linear(4, 6), nn.Linear(6, 2)
        self.double()

    def forward(self, x):
        x = self.before(x.clone().requires_grad_())
        return self.after(checkpoint(self.inside, x, use_reentrant=True).tanh())


@pytest.mark.parametrize("method", ["forward", "exact", None])
@pytest.mark.parametrize("before", [False, True])
def test_reentrant_checkpoints_are_refused(method, before):
    closure = closure_of(Checkpointed(before), method or "forward")
    closure.penalty = closure.penalty if method else None
    with pytest.raises(RuntimeError, match=r"reentrant"):
        closure()
