"""Every attack in a few cases, the same every time; `make fuzz` tries many others."""

from __future__ import annotations

import sys

import pytest
from fuzz.arena import Arena
from fuzz.attack import SEED, TIMES, hammer
from fuzz.classes import CLASSES
from fuzz.runs import machine
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="/proc, /dev/full and fork are Linux's"
)


@pytest.fixture(scope="module")
def arena(tmp_path_factory) -> Arena:
    return Arena(tmp_path_factory.mktemp("arena"))


@pytest.mark.parametrize("name", [name for name, few in CLASSES.items() if few.quick])
def test_is_survived(name, arena):
    few = CLASSES[name]
    hammer(few.attack(arena), few.quick)


def test_sequences_are_survived(arena):
    always = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    few = settings(max_examples=3 * TIMES, stateful_step_count=6, derandomize=TIMES == 1, **always)
    kind = seed(SEED)(machine(arena)) if TIMES > 1 else machine(arena)
    run_state_machine_as_test(kind, settings=few)
