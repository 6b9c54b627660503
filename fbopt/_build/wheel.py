"""The libraries that a binary wheel brings, and which of them this machine takes.

The CPU kernels come once per instruction set, each a library of its own: what the compiler makes of
an inline function for AVX-512 can then never be called on a processor without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from fbopt._build.compiler import targets

FOLDER = Path(__file__).resolve().parents[1] / "prebuilt"
CUDA_LIBRARY = "_cuda.so"
# Beside it: its CUDA version and architectures, known before it is loaded.
CUDA_FACTS = "cuda.json"


def cpu_library(target: str) -> str:
    """Return the name of the file with the CPU kernels for one of ``targets()``."""
    return f"_C.{target}.so"


def kernels() -> Path | None:
    """Return the widest CPU library that torch's own choice allows (see ATEN_CPU_CAPABILITY)."""
    if not FOLDER.is_dir():
        return None
    import torch

    names = list(targets())
    allowed = torch.backends.cpu.get_cpu_capability().lower()
    narrower = names[names.index(allowed) :] if allowed in names else names[-1:]
    files = (FOLDER / cpu_library(name) for name in narrower)
    return next((file for file in files if file.exists()), None)


def cuda() -> Path | None:
    """Return the CUDA library, if it is for torch's CUDA version and all the visible GPUs."""
    if not (FOLDER / CUDA_LIBRARY).exists():
        return None
    import torch

    facts = json.loads((FOLDER / CUDA_FACTS).read_text())
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    fits = _major(torch.version.cuda or "") == _major(facts["version"])
    fits = fits and all(covers(facts["architectures"], gpu) for gpu in gpus)
    return FOLDER / CUDA_LIBRARY if fits else None


def covers(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of that compute capability.

    Binaries run on their own major version from their minor version on, PTX on everything later;
    architecture-specific code (``9.0a``) on that one alone, family-specific code (``10.0f``) as
    binaries do.
    """
    return any(_runs(architecture, capability) for architecture in architectures)


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    major, minor, kind, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture).groups()
    built_for = (int(major), int(minor))
    if kind == "a":
        return built_for == capability
    same_major = built_for[0] == capability[0]
    return built_for <= capability and (same_major or (ptx is not None and kind == ""))


def _major(version: str) -> str:
    return version.split(".")[0]
