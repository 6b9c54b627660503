"""What an EigenTracker keeps between two updates, as tensors and plain numbers, and the check of a
state that is to be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbopt.analysis.tracker_prediction import Prediction
from fbopt.analysis.tracker_search import LENGTH, Search

COUNTS = ("updates", "products", "tracked")
NUMBERS = ("spare", "last", "guard")
ROWS = ("rows", "before", "chain")
OTHERS = ("weights", "matrix", "ahead")


@dataclass
class Memory:
    """What is kept from one update to the next.

    Attributes:
        tracked: how many eigenvalues are followed.
        search: for those that no tracked vector shows.
        prediction: of the eigenvectors; None before the first update.
        spare: products that earlier updates have left.
        last, guard: the last tracked eigenvalue, and the next one inwards.
    """

    tracked: int
    search: Search
    prediction: Prediction | None = None
    spare: float = 0.0
    last: float = -math.inf
    guard: float = -math.inf

    def state_dict(self, updates: int, products: int) -> dict[str, Any]:
        """All of it as tensors and plain numbers; {} before the first update."""
        known, search = self.prediction, self.search
        if known is None:
            return {}
        return {
            "updates": updates,
            "products": products,
            **{name: getattr(self, name) for name in ("tracked", *NUMBERS)},
            "rows": known.rows.clone(),
            "before": known.before.clone(),
            "weights": torch.tensor(known.weights, dtype=torch.float64),
            "chain": search.rows(),
            "matrix": torch.from_numpy(search.matrix.copy()),
            "ahead": search.ahead.clone(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state, in which nothing is wrong, into a fresh memory."""
        at = self.search.ahead.device
        self.tracked, self.spare = state["tracked"], state["spare"]
        self.last, self.guard = state["last"], state["guard"]
        self.prediction = Prediction(state["rows"].to(at, copy=True))
        self.prediction.before = state["before"].to(at, copy=True)
        a, b = state["weights"].tolist()
        self.prediction.weights = a, b
        matrix = state["matrix"].cpu().numpy()
        self.search.restore(state["chain"].to(at), matrix, state["ahead"].to(at))


def fault_of_tracker(state: Any, most: int) -> str | None:
    """What is wrong with a tracker's state of at most so many eigenvalues, as a clause."""
    names = {*COUNTS, *NUMBERS, *ROWS, *OTHERS}
    if state == {}:
        return None
    if not isinstance(state, Mapping) or set(state) != names:
        return "it has other entries than a tracker's state"
    for name in COUNTS:
        if type(state[name]) is not int or not 0 < state[name] < 2**53:
            return f"its {name} is no number above 0"
    for name in NUMBERS:  # no guard, in a space of as many dimensions as eigenvalues, is -inf
        if type(state[name]) is not float or math.isnan(state[name]) or state[name] == math.inf:
            return f"its {name} is no number"
    if state["tracked"] > most:
        return f"it tracks {state['tracked']} eigenvalues, of at most {most}"
    for name in (*ROWS, "matrix", "ahead", "weights"):
        if not isinstance(state[name], Tensor) or not state[name].is_floating_point():
            return f"its {name} is no tensor of numbers"
    return _fault_of_tensors(state)


def _fault_of_tensors(state: Mapping[str, Any]) -> str | None:
    k, length, ahead = state["tracked"], len(state["matrix"]), state["ahead"]
    shapes = {
        "weights": ((2,),),
        "ahead": ((ahead.numel(),),),
        "matrix": tuple((n, n) for n in range(LENGTH + 1)),
        "chain": ((length, ahead.numel()),),
        "rows": ((k, ahead.numel()), (k + 1, ahead.numel())),
        "before": (state["rows"].shape,),
    }
    for name, allowed in shapes.items():
        if tuple(state[name].shape) not in allowed:
            return f"its {name} has the shape {list(state[name].shape)}"
        if not torch.isfinite(state[name]).all():
            return f"its {name} holds infinite or undefined values"
        wide = name in ("weights", "matrix")
        if state[name].dtype != (torch.float64 if wide else ahead.dtype):
            return f"its {name} is of {state[name].dtype}"
    return None
