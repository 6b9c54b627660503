"""A module's training_step as the closure calls it: logging by weights, and once for each batch."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from fbopt.integrations.lightning.surroundings import pl


class TrainingSteps:
    """Run ``training_step`` on single batches within a step that Lightning takes for one batch.

    Only the first evaluation of a batch counts for logs and metrics, not those at perturbed
    parameters, of a line search, or in the second visit of exact sums.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module, self._signature = module, inspect.signature(module.log)
        self._copies: dict[int, Any] = {}
        self._is_replaced, self._passes = False, 0
        self._evaluated = -1

    @property
    def none_yet(self) -> bool:
        """Whether no batch was visited in this step, as a line search has in later evaluations."""
        return self._passes == 0

    def replace(self, step: Callable[[Any, int], Tensor]) -> None:
        """Let Lightning call `step` instead."""
        self.restore()
        self._before = self._module.__dict__.get("training_step")  # of a compiled module
        self._training_step = self._module.training_step
        self._takes_index = len(inspect.signature(self._training_step).parameters) > 1
        self._module.training_step, self._is_replaced = step, True
        self._passes = 0

    def restore(self) -> None:
        """Give the module its own training_step back."""
        if self._is_replaced:
            del self._module.training_step
            if self._before is not None:
                self._module.training_step = self._before
        self._is_replaced = False

    def begin_pass(self) -> None:
        """All batches are about to be visited."""
        self._passes += 1
        self._evaluated = -1

    def evaluate(self, module: pl.LightningModule, chunk: tuple[int, Any, float]) -> Any:
        """Return the loss of a batch."""
        index, batch, weight = chunk
        counts = self._passes == 1 and self._evaluated != index
        self._evaluated = index
        with self._logging(weight) if counts else self._apart():
            output = self._training_step(*((batch, index) if self._takes_index else (batch,)))
        return output.get("loss") if isinstance(output, Mapping) else output

    @contextlib.contextmanager
    def _logging(self, weight: float) -> Iterator[None]:
        """Let ``self.log`` average over the batches by their weights."""
        log = self._module.log

        def weighed(*args: Any, **kwargs: Any) -> None:
            given = self._signature.bind(*args, **kwargs)
            if not given.arguments.get("on_epoch"):
                given.arguments |= {"on_step": False, "on_epoch": True}
            if given.arguments.get("batch_size") is None:
                given.arguments["batch_size"] = weight
            log(*given.args, **given.kwargs)

        self._module.log = weighed
        try:
            yield
        finally:
            del self._module.log

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Let training_step log nothing, and update copies of the metrics."""
        kept = [
            (parent, name, metric)
            for parent in self._module.modules()
            for name, metric in parent.named_children()
            if isinstance(metric, (Metric, MetricCollection))
        ]
        for parent, name, metric in kept:
            if id(metric) not in self._copies:
                self._copies[id(metric)] = copy.deepcopy(metric)
            parent._modules[name] = self._copies[id(metric)]
        self._module.log = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del self._module.log
            for parent, name, metric in kept:
                parent._modules[name].reset()
                parent._modules[name] = metric
