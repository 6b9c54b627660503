"""list_parts lists what torch's own methods do, in their order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fbopt._engine.modules import list_parts


class Tied(nn.Module):
    """Tied parameters, a module used twice, and a circle."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.again, self.nothing = self.shared, None
        self.register_parameter("absent", None)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.shared.weight
        self.head.root = self


class Choosy(nn.Sequential):
    """Lists some of its parameters only."""

    def parameters(self, recurse=True):
        return iter(self[0].parameters())


class Hiding(nn.Module):
    """Keeps a teacher out of every list, also as a part of another model."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self
        yield from self.student.named_modules(memo, f"{prefix}.student", remove_duplicate)


def choosing() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.parameters = model[1].parameters
    return model


MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ModuleList([nn.PReLU()])),
    "tied": Tied,
    "own way": lambda: Choosy(nn.Linear(2, 2), nn.Linear(2, 2)),
    "a part in its own way": lambda: nn.Sequential(nn.Linear(2, 2), Hiding()),
    "by an attribute": choosing,
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    "compiled": lambda: torch.compile(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_lists_of_torch(name):
    model = MODELS[name]()
    modules, listed = list_parts(model)
    assert [*map(id, modules)] == [*map(id, model.modules())]
    assert [*map(id, listed)] == [*map(id, model.parameters())]
