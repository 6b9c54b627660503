"""Gauss-Newton, Fisher, densities and ranks over two processes: the numbers of one, on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import analysis_cases
import pytest
import ranks
import torch
import torch.distributed as dist

from fbopt.analysis import (
    Fisher,
    GaussNewton,
    Objective,
    critical_sharpness,
    directional_sharpness,
    fisher_trace,
    gradient_rank,
    hutchpp_trace,
    loss_gap,
    random_direction,
    spectral_density,
)


def objective(indices: Any, group: Any) -> Objective:
    """Seven chunks with BatchNorm; `indices` are this process's."""
    case = analysis_cases.convolutional()
    chunks = [pair for x, y in case.chunks for pair in zip(x.split(5), y.split(5), strict=True)]
    return Objective(case.model, case.loss_fn, [chunks[i] for i in indices], process_group=group)


def measures(target: Objective) -> dict[str, Any]:
    """What all processes should agree on."""
    direction = random_direction(target)
    drawn = {"draws": 2, "seed": 5}
    density = spectral_density(GaussNewton(target), 2, 5)
    return {
        "G v": GaussNewton(target)(direction),
        "F v": Fisher(target)(direction),
        "drawn F v": Fisher(target, "model", **drawn)(direction),
        "traces": [fisher_trace(target, samples=n).value for n in (None, 3)],
        "drawn trace": fisher_trace(target, "model", samples=3, **drawn).error,
        "nodes": density.nodes,
        "hutch++": hutchpp_trace(Fisher(target), 6).value,
        "ranks": [vars(gradient_rank(target, centered=c)) for c in (False, True)],
        "along": [directional_sharpness(target), critical_sharpness(target, precision=1e-9).value],
    }


def work(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What a process finds, and how it fails."""
    torch.set_num_threads(1)
    group = dist.group.WORLD
    found = {"in turn": measures(objective(range(rank, 7, world), group))}
    found["one has none"] = measures(objective([] if rank else range(7), group))
    target = objective(range(rank, 7, world), group)
    failures = {
        "batches": lambda: loss_gap(target, [3]),
        "operators": lambda: multiply(Fisher(target) if rank else GaussNewton(target)),
    }
    for name, call in failures.items():
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def multiply(operator: Any) -> torch.Tensor:
    return operator(torch.ones(operator.objective.size, dtype=torch.float64))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.run(work, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    return measures(objective(range(7), "local"))


# Random draws for a chunk depend on its place, which is that of chunks[rank::world] alone.
DRAWN = {"drawn F v", "drawn trace", "traces"}


@pytest.mark.parametrize("shares", ["in turn", "one has none"])
def test_the_numbers_are_those_of_one_process(found, alone, shares):
    for rank in found:
        for name, value in alone.items():
            if shares == "in turn" or name not in DRAWN:
                torch.testing.assert_close(
                    rank[shares][name],
                    value,
                    rtol=1e-7,
                    atol=1e-9,
                    msg=lambda m, n=name: f"{n}: {m}",
                )


def test_failures_are_those_of_all(found):
    for rank in found:
        assert "process_group='local'" in rank["batches"]
        assert "the pass" in rank["operators"] and "products" in rank["operators"]
