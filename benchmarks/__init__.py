"""Benchmarks: `python -m benchmarks.ops` and `python -m benchmarks.step`. Each first checks every
result against fbopt.reference, then times all contenders in turn, prints tables and writes JSON.
"""

import os
import sys

# OpenMP reads these once, when torch loads. Threads that wander between cores can lose milliseconds
# in every parallel region.
PINNING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
if "torch" not in sys.modules:
    for _name, _value in PINNING.items():
        os.environ.setdefault(_name, _value)
