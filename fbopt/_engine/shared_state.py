"""What chunks that are worked on at once share: buffers and attributes of the model's modules. A
pass over one chunk may not leave anything there for the next.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

Place = tuple[nn.Module, str]
Held = list[tuple[nn.Module, str, Tensor | None, int]]
# Attributes that every module has.
USUAL = frozenset(vars(nn.Module()))


class SharedState:
    """The buffers that no pass may write to, and the modules' attributes as a call finds them.

    Args:
        model: whose state.
        modules: its modules.
        recorded: buffers that every chunk has its own copy of.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[nn.Module], recorded: Sequence[Place]
    ) -> None:
        own = {(id(module), name) for module, name in recorded}
        self._model = model
        self._places = [
            (m, name) for m in modules for name, _ in m._buffers.items() if (id(m), name) not in own
        ]
        self._attributes = [(vars(m), _attributes(m)) for m in modules]

    def buffers(self) -> Held:
        """The buffers and their versions, for :meth:`refuse_writes`."""
        held = ((m, name, _buffer(m, name)) for m, name in self._places)
        return [(m, name, b, _version(b)) for m, name, b in held]

    def refuse_writes(self, before: Held) -> None:
        """Put replaced buffers back, and raise RuntimeError if one was written to or replaced."""
        for module, name, buffer, version in before:
            if _is_kept(_buffer(module, name), buffer, version):
                continue
            self.put_back(before)
            names = {id(m): n for n, m in self._model.named_modules()}
            path = f"{names[id(module)]}.{name}".lstrip(".")
            raise RuntimeError(
                f"{type(module).__name__} writes to its buffer {path} when it runs, and each chunk "
                "begins with what the one before has left there: chunks that are worked on at once "
                "cannot; pass vectorize=1 and compile=False"
            )

    @staticmethod
    def put_back(before: Held) -> None:
        """Put the tensors back that were in the buffers' places."""
        for module, name, buffer, _ in before:
            if _buffer(module, name) is not buffer:
                module._buffers[name] = buffer

    def drop_leftovers(self) -> None:
        """Put attributes back that hold tensors of torch.func, which are of use in a pass alone."""
        for table, own in self._attributes:
            for name in table.keys() - USUAL:
                if _holds_wrapped(table[name]):
                    _restore(table, name, own)


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    return module._buffers[name] if name in module._buffers else None  # noqa: SIM401 (TorchScript)


def _version(buffer: Tensor | None) -> int:
    return 0 if buffer is None or buffer.is_inference() else buffer._version


def _is_kept(now: Tensor | None, buffer: Tensor | None, version: int) -> bool:
    """Whether a place holds what it did; None may give way to a table that all chunks share."""
    if buffer is None:
        return not _is_wrapped(now)
    return now is buffer and _version(now) == version


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes, with copies of lists and dicts."""
    table = vars(module)
    found = ((name, table[name]) for name in table.keys() - USUAL)
    return {name: (x, copy.copy(x) if type(x) in (list, dict) else None) for name, x in found}


def _restore(table: dict[str, Any], name: str, own: dict[str, tuple[Any, Any]]) -> None:
    if name not in own:
        del table[name]
        return
    value, content = own[name]
    table[name] = value
    if type(value) is list:
        value[:] = content
    elif type(value) is dict:
        value.clear()
        value.update(content)


def _holds_wrapped(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_wrapped, value.values()))
    return any(map(_is_wrapped, value)) if isinstance(value, list | tuple) else _is_wrapped(value)


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, Tensor) and is_functorch_wrapped_tensor(value)
