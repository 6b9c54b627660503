"""Errors of passes that torch.func or torch.compile cannot make, and what to do instead."""

from __future__ import annotations

import contextlib
import re
import textwrap
import traceback
from collections.abc import Iterator

import torch
from torch import nn

from fbopt._engine.chunk import ChunkGradient
from fbopt._engine.chunk_groups import Group
from fbopt._engine.shared_state import SharedState
from fbopt._engine.vectorized_probe import Visit

LONGEST = 240  # characters of another error in one of ours
LIBRARIES = ("builtins", "torch")  # whose errors may come from torch.func


@contextlib.contextmanager
def explained(
    work: ChunkGradient, visit: Visit, state: SharedState, compiled: bool
) -> Iterator[None]:
    """Say what to do where chunks cannot be worked on at once; refuse writes to buffers.

    Where a chunk fails by itself, too, that error is raised; exceptions of the user's own pass.
    """
    if visit.is_captured:
        yield
        return
    before = state.buffers()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        state.put_back(before)
        if type(error).__module__.partition(".")[0] not in LIBRARIES:
            raise
        _repeat_one_by_one(work, visit, state)
        raise RuntimeError(_message(error, visit.group, compiled, work.forward.model)) from error
    state.refuse_writes(before)


def _repeat_one_by_one(work: ChunkGradient, visit: Visit, state: SharedState) -> None:
    state.drop_leftovers()
    visit.draws.begin()
    pairs = zip(visit.group.indices, visit.group.weights, strict=True)
    with work.in_passing(visit.draws):
        for k, (index, weight) in enumerate(pairs):
            before = state.buffers()
            work.probe(index, visit.stack.chunk(k), weight, visit.draws, None)
            state.refuse_writes(before)


def _message(error: Exception, group: Group, compiled: bool, model: nn.Module) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if not line.endswith(":")), "")
    how, cure = "worked on at once by torch.func.vmap", "pass vectorize=1"
    if compiled:
        how, cure = "compiled in one graph", "pass compile=False"
        cure += ", and vectorize=1 if that does not help" * (len(group) > 1)
    return (
        f"{group.where} cannot be {how}{_inside(error, model)}: {type(error).__name__}: "
        f"{textwrap.shorten(first, LONGEST, placeholder=' ...')}; {cure}"
    )


def _inside(error: Exception, model: nn.Module) -> str:
    """The innermost module of the model in which an error was raised, or a line of code."""
    names = {id(m): name for name, m in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            found = f" ({type(module).__name__} {names[id(module)]}".rstrip() + ")"
    if not found and (lines := re.findall(r'File "([^"]+)", line (\d+), in', str(error))):
        found = f" ({':'.join(lines[-1])})"
    return found


def refuse_hooks(work: ChunkGradient) -> None:
    """Refuse hooks on parameters, which torch.func does not call."""
    for p in work.sums.params:
        if p._backward_hooks:
            names = {id(q): name for name, q in work.forward.model.named_parameters()}
            raise RuntimeError(
                f"parameter {names.get(id(p), 'unnamed')} has a hook (register_hook), which "
                "torch.func does not call: remove it, or pass vectorize=1 and compile=False"
            )
