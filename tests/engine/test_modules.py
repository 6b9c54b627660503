"""list_modules and list_parameters list what torch's own methods do, in their order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fbopt._engine.modules import list_modules, list_parameters


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


MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ModuleList([nn.PReLU()])),
    "tied": Tied,
    "own way": lambda: Choosy(nn.Linear(2, 2), nn.Linear(2, 2)),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    "compiled": lambda: torch.compile(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_lists_of_torch(name):
    model = MODELS[name]()
    modules = list_modules(model)
    assert [*map(id, modules)] == [*map(id, model.modules())]
    listed = list_parameters(model, modules)
    assert [*map(id, listed)] == [*map(id, model.parameters())]
