"""Set-ups for fbopt.check: deliberate mistakes, each with what has to be named, and right ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty

Setup = tuple[FullBatchClosure, torch.optim.Optimizer | None]
MISTAKES: dict[str, tuple[Callable[[], Setup], str, str]] = {}
RIGHT: dict[str, Callable[[], Setup]] = {}
PENALTY = GradientPenalty(coefficient=0.1)


def mistake(about: str, words: str) -> Any:
    """A set-up in which `about` has to be found, in a text with these words."""

    def keep(build: Callable[[], Setup]) -> Callable[[], Setup]:
        MISTAKES[build.__name__] = build, about, words
        return build

    return keep


def right(build: Callable[[], Setup]) -> Callable[[], Setup]:
    RIGHT[build.__name__] = build
    return build


def samples(n=100, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def chunked(*tensors, size=32):
    return list(zip(*(t.split(size) for t in tensors), strict=True))


def mlp(*extra):
    return nn.Sequential(nn.Linear(6, 16), *extra, nn.ReLU(), nn.Linear(16, 3))


def sequences():
    """Tokens and targets, ragged: the first targets of each sequence are ignored."""
    tokens = torch.randint(0, 11, (40, 9))
    ignored = torch.arange(9) < torch.randint(0, 9, (40, 1))
    return tokens, tokens.masked_fill(ignored, -100)


def transformer(dropout=0.0):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
    return nn.Sequential(nn.Embedding(11, 8), layer, nn.Linear(8, 11))


def token_loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@mistake("chunks", "shuffle=True")
def shuffled_loader_with_penalty():
    """The loader itself is refused by the closure."""

    class Wrapped:
        def __iter__(self):
            return iter(DataLoader(TensorDataset(*samples()), 32, shuffle=True))

    return FullBatchClosure(mlp(), F.cross_entropy, Wrapped(), penalty=PENALTY), None


@mistake("chunks", "random augmentation")
def augmented_chunks_with_exact_sums():
    class Augmented(list):
        def __iter__(self):
            return ((x + 0.1 * torch.randn_like(x), y) for x, y in super().__iter__())

    chunks = Augmented(chunked(*samples()))
    return FullBatchClosure(mlp(), F.cross_entropy, chunks, accumulation="exact"), None


@mistake("weights", "class weights")
def class_weights():
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    return FullBatchClosure(mlp(), lambda a, b: loss_fn(a, b), chunked(*samples())), None


@mistake("weights", "ignored targets")
def token_means_weighted_by_sequences():
    chunks = chunked(*sequences(), size=16)
    return FullBatchClosure(transformer(), token_loss, chunks), None


@mistake("finite values", "all targets ignored")
def all_targets_of_a_chunk_ignored():
    x, y = samples()
    y[32:64] = -100
    return FullBatchClosure(mlp(), lambda a, b: F.cross_entropy(a, b), chunked(x, y)), None


@mistake("loss", "sums over samples")
def sum_in_place_of_a_mean():
    def loss_fn(output, target):
        return F.cross_entropy(output, target, reduction="sum")

    return FullBatchClosure(mlp(), loss_fn, chunked(*samples())), None


@mistake("chunks", "number of its samples is not clear")
def first_tensor_is_not_the_batch():
    chunks = [(torch.ones(3), x, y) for x, y in chunked(*samples())]

    def evaluate(model, chunk):
        return F.cross_entropy(model(chunk[1]), chunk[2])

    return FullBatchClosure(mlp(), chunks=chunks, evaluate=evaluate), None


@mistake("weights", "returns a constant")
def constant_weight():
    chunks = chunked(*samples())
    return FullBatchClosure(mlp(), F.cross_entropy, chunks, weight=lambda chunk: 1), None


@mistake("loss", "broadcast")
def targets_that_broadcast():
    x, _ = samples()
    return FullBatchClosure(nn.Linear(6, 1), F.mse_loss, chunked(x, x[:, 0])), None


@mistake("loss", "influence each other")
def contrastive_loss():
    def loss_fn(output, target):
        return F.cross_entropy(output @ output.T, torch.arange(len(output)))

    return FullBatchClosure(mlp(), loss_fn, chunked(*samples())), None


@mistake("optimizer", "never be trained")
def coefficients_outside_the_model():
    model, extra = mlp(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([*model.parameters(), extra])
    return FullBatchClosure(model, F.cross_entropy, chunked(*samples())), optimizer


@mistake("optimizer", "never move")
def a_layer_without_an_optimizer():
    model = mlp()
    optimizer = torch.optim.Adam(model[2].parameters())
    return FullBatchClosure(model, F.cross_entropy, chunked(*samples())), optimizer


@mistake("optimizer", "holds none of the closure's")
def closure_over_a_copy():
    model = mlp()
    chunks, optimizer = chunked(*samples()), torch.optim.SGD(model.parameters(), 0.1)
    return FullBatchClosure(copy.deepcopy(model), F.cross_entropy, chunks), optimizer


@mistake("optimizer", "another optimizer")
def coefficient_follows_another_optimizer():
    model, chunks = mlp(), chunked(*samples())
    old, new = (torch.optim.SGD(model.parameters(), lr) for lr in (0.1, 0.2))
    penalty = GradientPenalty()
    return FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty, optimizer=old), new


@mistake("parameters", "another model")
def evaluate_uses_another_model():
    other = mlp()

    def evaluate(model, chunk):
        return F.cross_entropy(other(chunk[0]), chunk[1])

    return FullBatchClosure(mlp(), chunks=chunked(*samples()), evaluate=evaluate), None


@mistake("parameters", "0.weight, 0.bias")
def layer_that_the_loss_does_not_reach():
    class Detach(nn.Module):
        def forward(self, x):
            return x.detach()

    return FullBatchClosure(mlp(Detach()), F.cross_entropy, chunked(*samples())), None


@mistake("same bits", "NumPy")
def noise_from_numpy():
    class Noise(nn.Module):
        def forward(self, x):
            return x * torch.from_numpy(np.random.rand(*x.shape)).to(x)

    return FullBatchClosure(
        mlp(Noise()), F.cross_entropy, chunked(*samples()), penalty=PENALTY
    ), None


@mistake("BatchNorm", "last chunk has 1 of")
def batchnorm_on_a_last_chunk_of_one():
    chunks = chunked(*samples(), size=33)
    return FullBatchClosure(mlp(nn.BatchNorm1d(16)), F.cross_entropy, chunks), None


@mistake("modes", "eval mode")
def eval_mode_left_on():
    model = mlp(nn.BatchNorm1d(16)).eval()
    return FullBatchClosure(model, F.cross_entropy, chunked(*samples())), None


@mistake("evaluate", "p.grad")
def evaluate_calls_backward():
    def evaluate(model, chunk):
        loss = F.cross_entropy(model(chunk[0]), chunk[1])
        loss.backward(retain_graph=True)
        return loss

    return FullBatchClosure(mlp(), chunks=chunked(*samples()), evaluate=evaluate), None


@mistake("evaluate", "changed 4 parameters")
def evaluate_takes_a_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def evaluate(model, chunk):
        loss = F.cross_entropy(model(chunk[0]), chunk[1])
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
        return F.cross_entropy(model(chunk[0]), chunk[1]) + loss.detach()

    return FullBatchClosure(model, chunks=chunked(*samples()), evaluate=evaluate), optimizer


@mistake("double backward", "weight_norm")
def exact_penalty_through_weight_norm():
    model = mlp()
    model[0] = nn.utils.parametrizations.weight_norm(model[0])
    return exact(model)


def exact(model):
    penalty = GradientPenalty(coefficient=0.1, method="exact")
    return FullBatchClosure(model, F.cross_entropy, chunked(*samples()), penalty=penalty), None


class Square(torch.autograd.Function):
    """x^2, with a backward that autograd cannot see into."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (2 * x * grad).detach()


class Once(Square):
    """The same; differentiating it twice is an error."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


@mistake("double backward", "makes no graph: Square")
def exact_penalty_through_a_custom_function():
    return exact(mlp(Apply(Square)))


@mistake("double backward", "makes no graph: Once")
def exact_penalty_through_a_function_of_first_order():
    return exact(mlp(Apply(Once)))


@mistake("radius", "too small for bfloat16")
def small_radius_under_autocast_in_evaluate():
    def evaluate(model, chunk):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(chunk[0]), chunk[1])

    penalty = GradientPenalty(coefficient=0.1, radius=1e-4)
    return FullBatchClosure(
        mlp(), chunks=chunked(*samples()), evaluate=evaluate, penalty=penalty
    ), None


@mistake("radius", "too small for bfloat16")
def shift_lost_in_bfloat16_parameters():
    x, y = samples()
    model, chunks = mlp().bfloat16(), chunked(x.bfloat16(), y)
    penalty = GradientPenalty(coefficient=0.1, radius=1e-4, method="central")
    return FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty), None


@mistake("radius", "times the norm of all parameters")
def radius_beyond_the_parameters():
    penalty = GradientPenalty(coefficient=0.1, radius=10.0)
    return FullBatchClosure(mlp(), F.cross_entropy, chunked(*samples()), penalty=penalty), None


@mistake("finite values", "0.weight")
def undefined_parameter():
    model = mlp()
    model[0].weight.data[0, 0] = torch.nan
    return FullBatchClosure(model, F.cross_entropy, chunked(*samples())), None


@mistake("chunks", "mat1")
def chunks_that_do_not_fit():
    x, y = samples()
    return FullBatchClosure(mlp(), F.cross_entropy, chunked(x[:, :5], y)), None


@right
def cnn_with_batchnorm_dropout_and_penalty():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )
    chunks = chunked(torch.randn(100, 3, 8, 8), samples()[1])
    optimizer = FullBatchGD(model.parameters(), lr=0.8, momentum=0.9, max_norm=0.25)
    closure = FullBatchClosure(
        model, nn.CrossEntropyLoss(), chunks, penalty=GradientPenalty(), optimizer=optimizer
    )
    return closure, optimizer


@right
def relu_mlp_with_exact_penalty_and_a_loader():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(TensorDataset(*samples()), 32)  # the last chunk has 4 samples
    penalty = GradientPenalty(method="exact")
    return FullBatchClosure(
        model, F.cross_entropy, loader, penalty=penalty, optimizer=optimizer
    ), optimizer


@right
def transformer_with_token_weights():
    def evaluate(model, batch):
        return token_loss(model(batch["tokens"]), batch["labels"])

    model, (tokens, labels) = transformer(dropout=0.1), sequences()
    chunks = [{"tokens": t, "labels": y} for t, y in chunked(tokens, labels, size=16)]
    optimizer = torch.optim.AdamW(model.parameters())
    return FullBatchClosure(
        model,
        chunks=chunks,
        evaluate=evaluate,
        weight=lambda batch: (batch["labels"] != -100).sum(),
        accumulation="exact",
    ), optimizer


@right
def physics_informed_network():
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    rate = torch.tensor(1.0, requires_grad=True)

    def evaluate(model, points):
        points = points.clone().requires_grad_()
        u = model(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return (slope - rate * u).square().mean()

    params = [*model.parameters(), rate]
    chunks = list(torch.rand(50, 1).split(20))
    optimizer = torch.optim.LBFGS(params)
    return FullBatchClosure(model, chunks=chunks, evaluate=evaluate, params=params), optimizer


@right
def frozen_layers_under_autocast():
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.5))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    chunks = chunked(*samples())
    return FullBatchClosure(model, F.cross_entropy, chunks, autocast=torch.bfloat16), optimizer


@right
def class_weights_weighted():
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    model = mlp()
    return FullBatchClosure(
        model,
        loss_fn,
        chunked(*samples()),
        weight=lambda chunk: loss_fn.weight[chunk[1]].sum(),
        penalty=GradientPenalty(coefficient=0.1, method="central"),
    ), torch.optim.SGD(model.parameters(), 0.1)


@right
def recurrent_network():
    model = nn.LSTM(6, 5, batch_first=True)
    chunks = list(torch.randn(40, 7, 6).split(16))

    def evaluate(model, x):
        return model(x)[0].square().mean()

    return FullBatchClosure(
        model, chunks=chunks, evaluate=evaluate, chunk_max_norm=1e-3
    ), torch.optim.SGD(model.parameters(), 0.1)
