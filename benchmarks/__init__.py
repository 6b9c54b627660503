"""Benchmarks: `python -m benchmarks.ops` and `python -m benchmarks.step` on the CPU, `python -m
benchmarks.epoch` on either, `python -m benchmarks.gpu_check` on a GPU. Each first checks every
result against fbopt.reference, then times all contenders in turn, prints tables and writes JSON.
"""

import os
import sys

# OpenMP reads these once, when torch loads. Threads that wander between cores can lose milliseconds
# in every parallel region.
PINNING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
# A pinned process hands its one core on to all it starts: compilers, a DataLoader's workers, the
# threads that launch.
_FREE = ("benchmarks.gpu", "benchmarks.sanitized", "benchmarks.epoch")
_PINNED = not any(word.startswith(_FREE) for word in sys.orig_argv)
if "torch" not in sys.modules and _PINNED:
    for _name, _value in PINNING.items():
        os.environ.setdefault(_name, _value)
