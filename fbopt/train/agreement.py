"""Whether the processes of a run compute alike: at its start, and whenever its state is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fbopt.train.checkpoint.digest import GROUPS, fingerprint
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.distributed import DistributedContext
from fbopt.train.trainer import Trainer

# The facts of an environment that decide bits, beside the processor's or the GPU's kind; others,
# such as the number of threads, may differ between machines.
FACTS = ("fbopt", "torch", "precision", "deterministic", "kernels")


class ProcessesDiffer(RuntimeError):
    """Processes of one run have other parameters, momentum or buffers than process 0."""


def check_options(context: DistributedContext, options: Options) -> None:
    """Refuse options of other processes that are not those of process 0. Raises OptionsError."""
    _check_same(context, options.as_json(), "give all of them the same options")


def check_environment(context: DistributedContext, facts: Mapping[str, Any]) -> None:
    """Refuse processes of other versions, kernels or instruction sets. Raises OptionsError."""
    kind = "processor" if facts["device"] == "cpu" else "device"
    _check_same(
        context,
        {name: facts[name] for name in (*FACTS, kind)},
        "start all with the same versions on processors of one kind (ATEN_CPU_CAPABILITY makes "
        "torch use a lesser instruction set, FBOPT_BACKEND other kernels)",
    )


def check_state(trainer: Trainer) -> None:
    """Compare the SHA-256 of parameters, momentum and buffers. Raises ProcessesDiffer on all."""
    context = trainer.context
    if context.is_single:
        return
    own = fingerprint(trainer.state_dict())
    everyone = context.all_gather_object([own[group] for group in GROUPS])
    if all(theirs == everyone[0] for theirs in everyone):
        return
    details = context.all_gather_object(own["tensors"])
    rank, what = _first_difference(details)
    raise ProcessesDiffer(
        f"at step {trainer.step} the {what} of process {rank} is not that of process 0: what was "
        "computed since the last save cannot be trusted. Look for a fault of that machine's memory "
        "or processor, then go on from the last save"
    )


def _first_difference(details: Sequence[Mapping[str, Mapping[str, str]]]) -> tuple[int, str]:
    """The rank and the tensor, or the group of them, that is not as on rank 0."""
    first = details[0]
    for rank, theirs in enumerate(details):
        for group in GROUPS:
            for name in {**first[group], **theirs[group]}:
                if first[group].get(name) != theirs[group].get(name):
                    return rank, f"{group.removesuffix('s')} {name}"
    return 1, "state"


def _check_same(context: DistributedContext, facts: Mapping[str, Any], cure: str) -> None:
    try:
        context.check_same(facts, cure)
    except ValueError as error:
        raise OptionsError(str(error)) from error
