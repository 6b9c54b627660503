"""The prebuilt libraries of a binary wheel, and which one this machine loads: one library of
CPU kernels per instruction set, so that no code for AVX-512 runs on a processor without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from fbopt._build.compiler import TARGETS

FOLDER = Path(__file__).resolve().parents[1] / "prebuilt"
CPU_LIBRARY = "_C.{}.so"  # of one of TARGETS
CUDA_LIBRARY = "_cuda.so"
# Beside it: its CUDA version and architectures, known before it is loaded.
CUDA_FACTS = "cuda.json"


def kernels() -> Path | None:
    """Return the widest CPU library that torch's own choice allows (see ATEN_CPU_CAPABILITY)."""
    import torch

    names = list(TARGETS)
    allowed = torch.backends.cpu.get_cpu_capability().lower()
    narrower = names[names.index(allowed) if allowed in names else -1 :]
    files = (FOLDER / CPU_LIBRARY.format(name) for name in narrower)
    return next((file for file in files if file.exists()), None)


def cuda() -> Path | None:
    """Return the CUDA library, if it is for torch's CUDA version and all the visible GPUs."""
    if not (FOLDER / CUDA_LIBRARY).exists():
        return None
    import torch

    facts = json.loads((FOLDER / CUDA_FACTS).read_text())
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    fits = (torch.version.cuda or "").split(".")[0] == facts["version"].split(".")[0]
    fits = fits and all(covers(facts["architectures"], gpu) for gpu in gpus)
    return FOLDER / CUDA_LIBRARY if fits else None


def covers(architectures: Iterable[str], gpu: tuple[int, int]) -> bool:
    """Return whether code for these architectures runs on a GPU of that compute capability.

    Binaries run on later minors of their major version, PTX on everything later. Of the specific
    kinds ``9.0a`` runs on 9.0 alone, and ``10.0f`` wherever a binary for 10.0 does.
    """
    for architecture in architectures:
        number, kind, ptx = re.fullmatch(r"([\d.]+)([af]?)(\+PTX)?", architecture).groups()
        built_for = tuple(map(int, number.split(".")))
        later = built_for <= gpu and (built_for[0] == gpu[0] or (ptx and not kind))
        if built_for == gpu or (later and kind != "a"):
            return True
    return False
