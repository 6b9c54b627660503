"""The stages of the GPU check, a module each: `run(report, settings)` fills the report, and raises
StageFailed for a finding that fails the stage, Unavailable for what this machine does not have.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

STAGES = ("build", "tests", "sanitize", "ops", "finishing", "graphs", "step")
# What a stage may plan with, of the seconds after which it is stopped.
SHARE = 0.85


class StageFailed(RuntimeError):
    """The stage ran and found something wrong."""


class Unavailable(RuntimeError):
    """The stage needs something that is not here: neither passed nor failed."""


@dataclass(frozen=True)
class Settings:
    """How a stage is to run.

    Args:
        device: `"cuda"`, or `"cpu"` for a rehearsal.
        quick: few rounds and small sizes, to see that all works.
        seconds: after which the stage is stopped.
        rounds: how often each contender gets its turn, if not as often as the time allows.
        images: the size of the data set of whole steps, if not 50,000.
        precisions: those that whole steps are taken in.
    """

    device: str = "cuda"
    quick: bool = False
    seconds: float = 540.0
    rounds: int | None = None
    images: int | None = None
    precisions: tuple[str, ...] = ("bf16", "tf32", "float32")
    begun: float = field(default_factory=time.monotonic)

    @property
    def where(self) -> torch.device:
        """The device; all stages use the current one."""
        return torch.device(self.device)

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU to check."""
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds that may still be planned with."""
        return max(0.0, SHARE * self.seconds - (time.monotonic() - self.begun))
