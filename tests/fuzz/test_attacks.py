"""Every attack in a few cases, in a process of its own: it forks, which a process that has computed
a gradient cannot do before another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ATTACKS = Path(__file__).with_name("attacks.py")


@pytest.mark.timeout(900)
def test_attacks_are_survived():
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*words, ATTACKS], capture_output=True, text=True, env=kept, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
