"""How fast a run goes, from its metrics: images/s = samples that a gradient was taken of / seconds.

Between the first line since the run was started, which bears compilation, and the last.
"""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve


class Speed(NamedTuple):
    """A measurement: optimizer steps it covers, images and gradients of each per second."""

    steps: int
    images_per_s: float  # that went through the model, each as often as it has gradients
    gradients: float  # of an image in a pass
    seconds_left: float

    def __str__(self) -> str:
        """In words."""
        each = f"{self.gradients:.2g} gradient{'s' * (self.gradients != 1)}"
        left = timedelta(seconds=round(self.seconds_left))
        return f"{self.images_per_s:,.0f} images/s with {each} of each, {left} to its end"


def measure(options: Options, since: int = 0) -> Speed | None:
    """The speed of a run since it was last started; None where its metrics do not tell it yet.

    Args:
        options: of the run; its metrics are in `options.out`.
        since: a step; those up to it are left out in any case.
    """
    folder, options = RunFolder(options.out), resolve(options)
    started = max([since, *(line["step"] for line in atomic.read_lines(folder.environment))])
    # Runs of earlier versions logged no sample passes.
    known = [line for line in folder.read_metrics() if "sample_passes" in line]
    lines = [line for line in known if line["step"] > started]
    if not lines or (seconds := lines[-1]["seconds"] - lines[0]["seconds"]) <= 0:
        return None
    keys = ("step", "pass", "gradient_evaluations", "sample_passes")
    steps, passes, gradients, images = (lines[-1][key] - lines[0][key] for key in keys)
    left = (options.passes - lines[-1]["pass"]) * seconds / passes
    return Speed(steps, images / seconds, gradients / passes, left)
