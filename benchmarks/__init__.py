"""Benchmarks that check every result against fbopt.reference before they time it.

`python -m benchmarks.ops`, `.step` and `.train_step` print tables and write JSON to
benchmarks/results; `python -m benchmarks.gpu_check` runs all of them, and the tests, on a GPU, and
`python -m benchmarks.gpu_ladder` trains there at the paper's scale.

On a machine with other work or several sockets, choose the cores and the threads:
`taskset -c 0,1 python -m benchmarks.ops --threads 2`.
"""

import os
import sys

# Before torch pins this process to one of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
# OpenMP reads these once, when torch loads. Threads that move between cores can lose milliseconds
# in every parallel region.
PINNING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
# A pinned process passes its one core on to all it starts: compilers, DataLoader workers, and the
# threads that launch kernels on a GPU.
_UNPINNED = ("benchmarks.gpu_check", "benchmarks.gpu_stages", "benchmarks.sanitized")
_UNPINNED += ("benchmarks.sanitizers", "benchmarks.train_step", "benchmarks.gpu_ladder", "cuda")
_UNPINNED += ("benchmarks.ensemble",)
if "torch" not in sys.modules and not any(word.endswith(_UNPINNED) for word in sys.orig_argv):
    for _name, _value in PINNING.items():
        os.environ.setdefault(_name, _value)
