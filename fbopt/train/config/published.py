"""The accuracies that the paper reports for the recipes, and its tables.

Geiping et al. (ICLR 2022, arXiv 2109.14119): CIFAR-10, ResNet-18, mean ± standard deviation. Of the
tables without random augmentation only what the best full-batch rows exceed is noted.
"""

from __future__ import annotations

from typing import NamedTuple

from fbopt.train.config.recipes import NAMES

ACCURACY = {
    "sgd-aug": "95.70 ± 0.11",
    "fb-aug": "75.42 ± 0.13",
    "fb-long-aug": "87.36 ± 1.23",
    "fb-clip-aug": "93.85 ± 0.10",
    "fb-penalty-aug": "95.36 ± 0.07",
    "fb-strong-aug": "95.67 ± 0.08",
    "fb-shuffled-aug": "95.91 ± 0.14",
}


class Table(NamedTuple):
    """A table of the paper: its title, the suffix of its recipes, what else is known of it."""

    title: str
    suffix: str
    note: str = ""

    @property
    def names(self) -> list[str]:
        """The recipes of its rows, in order."""
        if self.suffix:
            return [name for name in NAMES if name.endswith(self.suffix)]
        return [name for name in NAMES if not name.endswith(("-aug", "-x10", "-x40"))]


TABLES = (
    Table("Without augmentation", "", "full batch reaches over 90 %"),
    Table("With augmentation: new crops and flips in every pass", "-aug"),
    Table("A fixed data set, 10 times enlarged", "-x10", "full batch reaches over 95 %"),
    Table("A fixed data set, 40 times enlarged", "-x40"),
)


def accuracy(name: str) -> str:
    """The published test accuracy (%) of a recipe's own row, "" where it is not known here."""
    return ACCURACY.get(name, "")


def step_of_the_ladder(name: str) -> str:
    """The published figure of the same step of the ladder, with augmentation; "" if unknown.

    For small data, which the paper has no figures for: what each step was worth there.
    """
    return accuracy(name) or ACCURACY.get(f"{name}-aug", "")
