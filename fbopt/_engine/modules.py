"""Lists of a model's modules and parameters, as ``modules()`` and ``parameters()`` give them but
without the names, which take most of the time: a closure looks at them in every call.
"""

from __future__ import annotations

from torch import Tensor, nn

LISTING = ("modules", "named_modules", "parameters", "named_parameters", "_named_members")


def list_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, each once, a module before those in it."""
    found: dict[int, nn.Module] = {}
    _collect(model, found)
    modules = list(found.values())
    return modules if _list_as_usual(model, modules) else list(model.modules())


def _collect(module: nn.Module, found: dict[int, nn.Module]) -> None:
    if id(module) not in found:
        found[id(module)] = module
        for child in module._modules.values():
            if child is not None:
                _collect(child, found)


def list_parameters(model: nn.Module, modules: list[nn.Module]) -> list[Tensor]:
    """Return the parameters of a model with these modules, each once."""
    if not _list_as_usual(model, modules):
        return list(model.parameters())
    held = (p for m in modules for p in m._parameters.values() if p is not None)
    return list({id(p): p for p in held}.values())


def _list_as_usual(model: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether no class of these modules, nor the model itself, lists in a way of its own."""
    kinds = set(map(type, modules))
    usual = all(getattr(k, name) is getattr(nn.Module, name) for k in kinds for name in LISTING)
    return usual and vars(model).keys().isdisjoint(LISTING)
