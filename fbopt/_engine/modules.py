"""Lists of a model's modules and parameters, as ``modules()`` and ``parameters()`` give them but
without the names, which take most of the time: a closure looks at them in every call.
"""

from __future__ import annotations

import operator

from torch import Tensor, nn

LISTING = ("modules", "named_modules", "parameters", "named_parameters", "_named_members")
_methods = operator.attrgetter(*LISTING)


def list_parts(model: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """Return the modules of a model, a module before those in it, and its parameters, each once."""
    found, waiting = dict[int, nn.Module](), [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                children = reversed(module._modules.values())
                waiting += [child for child in children if child is not None]
    modules = list(found.values())
    if not _list_as_usual(model, modules):
        return list(model.modules()), list(model.parameters())
    params = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    return modules, list(params.values())


def _list_as_usual(model: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether no class of these modules, nor the model itself, lists in a way of its own."""
    kinds = set(map(type, modules))
    usual = _methods(nn.Module)
    return all(_methods(k) == usual for k in kinds) and vars(model).keys().isdisjoint(LISTING)
