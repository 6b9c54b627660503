"""What cannot be captured in CUDA graphs: refused before, or explained after a failed capture."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fbopt._engine.chunk_groups import Group
from fbopt._engine.cuda_capture import RECORDERS


def graph_device(model: nn.Module, params: Iterable[Tensor]) -> torch.device:
    """Return the one device that the model is on, or raise a ValueError that names cuda_graph."""
    devices = {t.device for t in (*params, *model.parameters(), *model.buffers())}
    if len(devices) > 1 or next(iter(devices)).type not in RECORDERS:
        names = " and ".join(sorted(str(d) for d in devices))
        raise ValueError(
            f"cuda_graph=True needs all parameters and buffers on one CUDA device, they are on "
            f"{names}: move the model there first (model.cuda()), or leave cuda_graph out"
        )
    return devices.pop()


def refuse_nested(model: nn.Module) -> None:
    """Refuse a model that torch.compile captures in graphs of its own."""
    for name, module in model.named_modules():
        for compiled in (module, module._compiled_call_impl):
            config = getattr(compiled, "get_compiler_config", lambda: None)()
            if isinstance(config, dict) and config.get("triton.cudagraphs"):
                what = f"module {name}" if name else "the model"
                raise ValueError(
                    f"cuda_graph=True captures whole chunks, but torch.compile already captures "
                    f"{what} in graphs of its own: compile it with the default mode or "
                    "mode='max-autotune-no-cudagraphs', or leave cuda_graph out"
                )


def explain(error: RuntimeError, which: int | Group) -> None:
    """Raise an error that says what made a capture fail and how to cure it, if one did."""
    first: BaseException | None = None
    cause: BaseException | None = error
    while cause is not None:
        first = cause if "captur" in str(cause) else first
        cause = cause.__context__
    if first is None:
        return
    lines = str(first).splitlines() or [""]
    where = which.where if isinstance(which, Group) else f"chunk {which}"
    raise RuntimeError(
        f"{where} cannot be captured in a CUDA graph ({type(first).__name__}: {lines[0]}): "
        "the model, the loss or a hook waits for the device (.item(), .cpu(), printing, a shape "
        "or a branch that depends on values), or handles a random generator itself: take that "
        "out, or pass cuda_graph=False"
    ) from first
