"""check: a few small passes that compare what a closure computes with what it should."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fbopt._diagnosis import means, passes, setup
from fbopt._diagnosis.double_backward import check_double_backward
from fbopt._diagnosis.probe import Probe
from fbopt._diagnosis.radius import check_radius
from fbopt._diagnosis.report import DOUBT, ERROR, Finding, Report
from fbopt._engine.modes import measuring

if TYPE_CHECKING:
    from fbopt.closure import FullBatchClosure

__all__ = ["Diagnosis", "Finding", "check"]
WIDTH = 100


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`fbopt.check`; printed, it is a plain verdict.

    Attributes:
        findings: mistakes and doubts, a :class:`Finding` each, mistakes first.
        checked: the names of the checks that were made.
        unchecked: those that could not be made, each with the reason.
        scope: how much was looked at.
    """

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: dict[str, str]
    scope: str

    @property
    def ok(self) -> bool:
        """Whether no mistake was found; doubts do not count."""
        return not any(f.severity == ERROR for f in self.findings)

    def __str__(self) -> str:
        """One line where all is right, and one for what could not be checked."""
        errors = sum(f.severity == ERROR for f in self.findings)
        counts = _plural(errors, "error"), _plural(len(self.findings) - errors, "doubt")
        verdict = ", ".join(c for c in counts if c) or "all right"
        lines = [f"{verdict} ({self.scope}: {', '.join(self.checked)})"]
        for f in self.findings:
            lines += [f"{f.severity}: {f.about}", *_wrapped(f"{f.found}")]
            lines += [*_wrapped(f"likely cause: {f.cause}"), *_wrapped(f"cure: {f.cure}")]
        lines += [f"not checked: {name} ({reason})" for name, reason in self.unchecked.items()]
        return "\n".join(lines)


def check(closure: FullBatchClosure, optimizer: torch.optim.Optimizer | None = None) -> Diagnosis:
    """Look for mistakes in a closure by a few passes over its first three chunks.

    Compares the loss and gradient of chunks with those of their parts by the closure's weights; a
    second pass over each chunk, and a second visit of ``chunks``, with the first; a penalty's
    Hessian-gradient product with differences in float64; the parameters of closure and optimizer.

    Parameters, gradients, buffers, modes, random generators (torch's, NumPy's, Python's) and the
    closure itself are afterwards what they were. ``observe`` and ``on_pass_start`` are not called.
    With a ``process_group`` all its processes have to call this.

    Args:
        closure: a :class:`FullBatchClosure`.
        optimizer: the one that steps; by default the closure's.

    Returns:
        a :class:`fbopt.diagnosis.Diagnosis`; ``print`` it.

    Raises:
        TypeError: an argument of another type.
    """
    if not hasattr(closure, "accumulator") or not hasattr(closure, "chunks"):
        raise TypeError(f"closure must be a FullBatchClosure, got {type(closure).__name__}")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}"
        )
    probe, report = Probe(closure), Report()
    number = 0
    setup.check_setup(probe, optimizer, report)
    with probe.no_trace(), torch.no_grad():
        number = _visit(probe, report)
    if probe.changed:
        report.error(
            "evaluate",
            f"a pass has changed {len(probe.changed)} parameters: {setup.some(probe.changed)}",
            "the model, evaluate or loss_fn writes to parameters",
            "write only between the steps",
        )
    ranked = sorted(report.findings, key=lambda f: f.severity == DOUBT)
    return Diagnosis(tuple(ranked), tuple(report.checked), report.unchecked, _scope(probe, number))


def require_right(closure: FullBatchClosure, optimizer: torch.optim.Optimizer | None) -> None:
    """Check as ``debug=True`` does: raise for mistakes, warn of doubts, print if all is right."""
    diagnosis = check(closure, optimizer)
    if not diagnosis.ok:
        raise RuntimeError(f"FullBatchClosure(debug=True) found {diagnosis}")
    if diagnosis.findings:
        warnings.warn(f"FullBatchClosure(debug=True) found {diagnosis}", stacklevel=6)
    elif closure._reduction.collectives.rank == 0:
        print(f"fbopt check: {diagnosis}")


def _visit(probe: Probe, report: Report) -> int:
    """Make the checks that need chunks; return how many there were."""
    chunks: list[Any] = []
    weighed: list[Any] = []
    try:
        chunks = probe.few_chunks()
        weighed = [c for i, c in enumerate(chunks) if probe.weight(i, c)]  # others are not run
    except Exception as error:
        found, _, cure = " ".join(str(error).split())[:400].partition(": ")
        cause = f"chunks that the closure cannot use ({type(error).__name__})"
        report.error("chunks", found, cause, cure or "look at the first chunks by themselves")
    passes.check_same_chunks(probe, chunks, report)
    if probe.is_sharded:  # whose processes make their passes together
        counts = probe.closure._reduction.collectives.all_gather_object(len(weighed))
        weighed = weighed[: min(counts)]
    if not weighed:
        return len(chunks)
    setup.check_last_chunk(probe, weighed, report)
    if passes.check_passes(probe, weighed, report):
        means.check_means(probe, weighed, report)
        _check_penalty(probe, weighed[0], report)
    return len(chunks)


def _check_penalty(probe: Probe, chunk: Any, report: Report) -> None:
    """Check how the penalty's product H g is computed, without dropout."""
    penalty = probe.closure.penalty
    if penalty is None:
        return
    about = "double backward" if penalty.method == "exact" else "radius"
    try:
        if probe.is_sharded:
            raise ValueError("parameters are sharded")
        if penalty.direction.eta is not None:
            raise ValueError("the perturbation is relative to the parameters")
        with measuring(probe.model, "kept", "off"):  # float64 masks would be others
            if penalty.method == "exact":
                reason = check_double_backward(probe, chunk, report)
            else:
                reason = check_radius(probe, penalty, chunk, report)
    except Exception as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
    if reason:
        report.skip(about, reason)


def _scope(probe: Probe, number: int) -> str:
    try:
        every = f" of {len(probe.closure.chunks)}"  # type: ignore[arg-type]
    except TypeError:
        every = ""
    return f"{number}{every} chunks"


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number > 1)}" if number else ""


def _wrapped(text: str) -> Iterable[str]:
    indent = " " * 4
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
