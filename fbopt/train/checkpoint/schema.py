"""What the files of a run have to hold, checked when they are read rather than when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fbopt.analysis.tracker_state import fault_of_tracker
from fbopt.train.config.options import EIGENVALUES

NUMBER = (int, float)
RESULT = {
    "step": int, "pass": int, "gradient_evaluations": int, "loss": NUMBER,
    "train_accuracy": NUMBER, "seconds": NUMBER, "sample_passes": int,
    "validation_accuracy": NUMBER, "test_accuracy": NUMBER,
    "validation_loss": NUMBER, "test_loss": NUMBER,
}  # fmt: skip
OPTIONAL = (
    "sample_passes", "validation_accuracy", "test_accuracy", "validation_loss", "test_loss",
)  # fmt: skip
LARGEST = 1e15
METRICS = {name: RESULT[name] for name in ("step", "pass", "loss", "seconds")}
SQUARE = "mean_squared_chunk_norm"
CHECKPOINT = {
    "step": int, "options": dict, "parameters": list, "seconds": NUMBER, "fitted": int,
    "model": dict, "optimizer": dict, "scheduler": dict, "rng": Tensor, "correct": Tensor,
    "loss": Tensor, "chunk_sqnorm": Tensor, "data": str, "environment": dict,
}  # fmt: skip
HISTORY = "lbfgs"  # in place of a parameter's index
MEANS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg")  # an element for each
ACCURACIES = ("validation_accuracy", "test_accuracy")


def fault(values: Any, schema: Mapping[str, Any]) -> str | None:
    """What is wrong with values, as a clause; None if each name is there with its type."""
    if not isinstance(values, Mapping):
        return f"it holds {type(values).__name__}, no named values"
    for name, kind in schema.items():
        if name not in values and name not in OPTIONAL:
            return f"it has no {name}"
        value = values.get(name)
        if name in values and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"its {name} is of type {type(value).__name__}"
        # Losses may be anything, also of a run that went wrong.
        if not name.endswith("loss") and isinstance(value, NUMBER) and not abs(value) < LARGEST:
            return f"its {name} is no number that could be right"
    return None


def fault_of_result(values: Any) -> str | None:
    """What is wrong with the content of result.json."""
    found = fault(values, RESULT)
    if found is not None:
        return found
    shares = [values[name] for name in ACCURACIES if name in values]
    if not shares or not all(0 <= share <= 1 for share in shares):
        return "it has no accuracy from 0 to 1"
    return next(
        (f"it has no {n.replace('accuracy', 'loss')}" for n in ACCURACIES
         if n in values and n.replace("accuracy", "loss") not in values), None,
    )  # fmt: skip


def fault_of_metrics(record: Any) -> str | None:
    """What is wrong with a line of metrics.jsonl, all of whose values are numbers."""
    found = fault(record, METRICS)
    if found is None and not all(map(_is_number, record.values())):
        found = "it holds something else than numbers"
    if found is None and (record.get(SQUARE) or 0) < 0:
        found = f"its {SQUARE} is negative"
    return found


def _is_number(value: Any) -> bool:
    """Whether a value is None or a number that Python's floats can hold."""
    if isinstance(value, bool):
        return False
    return value is None or isinstance(value, float) or (type(value) is int and abs(value) < 1e300)


def fault_of_checkpoint(state: Any) -> str | None:
    """What is wrong with the content of a checkpoint."""
    found = fault(state, CHECKPOINT)
    if found is not None:
        return found
    model, names = state["model"], state["parameters"]
    if not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in model.items()):
        return "its model holds something else than tensors"
    if not all(isinstance(name, str) for name in names):
        return "its parameters are not named"
    if state["step"] < 0:
        return f"its step is {state['step']}"
    for part in ("options", "environment"):
        for key, value in state[part].items():
            if not isinstance(key, str) or not _is_plain(value):
                return f"its {part} hold something else than plain values"
    kept = state["optimizer"].get("state")
    if not isinstance(kept, dict) or not isinstance(state["optimizer"].get("param_groups"), list):
        return "its optimizer's state is not one of torch.optim"
    for index, values in kept.items():
        known = index == HISTORY or (type(index) is int and 0 <= index < len(names))
        if not known or not isinstance(values, dict):
            return f"its optimizer has a state of {index!r}, of {len(names)} parameters"
    return _fault_of_curvature(state)


def _fault_of_curvature(state: Mapping[str, Any]) -> str | None:
    """What is wrong with the tracked eigenvectors, of which there may be none."""
    if "curvature" not in state:
        return None
    known = state["curvature"]
    if wrong := fault_of_tracker(known, EIGENVALUES):
        return f"of its curvature {wrong}"
    if not known:
        return "its curvature is empty"
    params = [state["model"].get(name) for name in state["parameters"]]
    size = sum(p.numel() for p in params if p is not None)
    if any(p is None for p in params) or known["ahead"].numel() != size:
        return f"its curvature is of {known['ahead'].numel()} parameters, not of {size}"
    wide = any(p.dtype == torch.float64 for p in params)
    if known["ahead"].dtype != (torch.float64 if wide else torch.float32):
        return f"its curvature is of {known['ahead'].dtype}, not of the parameters' precision"
    return None


def _is_plain(value: Any) -> bool:
    """Whether a value could come from JSON, without nested objects."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def fault_of_parts(state: Mapping[str, Any], own: Mapping[str, Any], passes: int) -> str | None:
    """How a checkpoint's parts differ in kind from those of the trainer that is to load it.

    `own` is the trainer's state before its first step, and `passes` are those of the checkpoint's
    steps. What an update rule keeps of a parameter has its shape or is a number; L-BFGS's pairs,
    and what there is not before the first step, are left to the optimizer.
    """
    free = ("options", "environment", "data", "format", "model", "optimizer", "cuda_rng", "closure",
            "scheduler")  # fmt: skip
    closure, fresh = state.get("closure"), own.get("closure")
    if isinstance(closure, dict) and "whole" in closure and isinstance(fresh, dict):
        # Of the visit for the gradient of all chunks, made in the first step.
        if wrong := _other(closure["whole"], fresh, "closure.whole"):
            return wrong
        closure = {name: value for name, value in closure.items() if name != "whole"}
    if wrong := _other(closure, fresh, "closure"):
        return wrong
    for name, mine in own.items():
        if name not in free and (wrong := _other(state.get(name), mine, name)):
            return wrong
    schedule, mine = state["scheduler"], own["scheduler"]
    rates = schedule.get("base_lrs"), schedule.get("last_epoch")
    if rates != (mine["base_lrs"], passes):
        return f"its learning rate is not that of these options after {passes} passes"
    common = [key for key in mine if key in schedule]  # others depend on torch's version
    both = ({key: values[key] for key in common} for values in (schedule, mine))
    if wrong := _other(*both, "scheduler"):
        return wrong
    groups, mine = (s["optimizer"]["param_groups"] for s in (state, own))
    if wrong := _other_groups(groups, mine):
        return wrong
    shapes = [own["model"][name].shape for name in own["parameters"]]
    if len(shapes) != len(state["parameters"]):
        return f"it is of {len(state['parameters'])} parameters, not of {len(shapes)}"
    for index, kept in state["optimizer"]["state"].items():
        for key, value in kept.items() if index != HISTORY else ():
            if not _fits(key, value, shapes[index]):
                return f"its {key} of {own['parameters'][index]} does not fit the parameter"
    return None


def _other_groups(groups: list[Any], own: list[dict[str, Any]]) -> str | None:
    """How parameter groups differ from those that the options make; the rate follows a schedule.

    Some rules add entries with their first step, and a switch may be younger than the checkpoint.
    """
    if len(groups) != len(own) or not all(isinstance(group, dict) for group in groups):
        return "its param_groups have another length"
    for number, (group, mine) in enumerate(zip(groups, own, strict=True)):
        for key, value in mine.items():
            name = f"param_groups[{number}].{key}"
            if key not in group:
                if value not in (None, False):
                    return f"it has no {name}"
            elif wrong := _other(group[key], value, name):
                return wrong
            elif key == "lr" and not 0 <= float(group[key]) < LARGEST:
                return f"its {name} is no rate"
            elif key != "lr" and not isinstance(value, Tensor) and group[key] != value:
                return f"its {name} is {group[key]}, not {value}"
    return None


def _fits(key: Any, value: Any, shape: tuple[int, ...]) -> bool:
    """Whether an update rule may keep this of a parameter: None, a number, or one per element."""
    if isinstance(value, Tensor):
        alone = value.shape in ((), (1,)) and key not in MEANS
        return value.is_floating_point() and (value.shape == shape or alone)
    return value is None or (key not in MEANS and isinstance(value, NUMBER))


def _other(found: Any, mine: Any, name: str) -> str | None:
    """How a value differs in kind from one that it is to replace."""
    if name.endswith("exponents"):  # of exact sums; as many as there are tensors in a pass
        whole = isinstance(found, list) and all(type(e) is int and abs(e) < 2000 for e in found)
        return None if whole else f"its {name} are no list of exponents"
    if isinstance(mine, Tensor):
        same = isinstance(found, Tensor) and (found.shape, found.dtype) == (mine.shape, mine.dtype)
        return None if same else f"its {name} is no {mine.dtype} {list(mine.shape)}"
    if isinstance(mine, dict):
        if not isinstance(found, dict) or set(found) != set(mine):
            return f"its {name} has other entries"
        pairs = [(found[key], mine[key], f"{name}.{key}") for key in mine]
    elif isinstance(mine, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(mine):
            return f"its {name} has another length"
        pairs = [(f, m, f"{name}[{i}]") for i, (f, m) in enumerate(zip(found, mine, strict=True))]
    else:
        return None if _kind(found) == _kind(mine) else f"its {name} is {type(found).__name__}"
    return next((wrong for pair in pairs if (wrong := _other(*pair))), None)


def _kind(value: Any) -> type:
    """Numbers are of one kind."""
    return float if isinstance(value, NUMBER) and not isinstance(value, bool) else type(value)
