"""The GPU architectures that the CUDA kernels are built for: asked for, or visible, or common.

An architecture is written as torch writes it: ``9.0``, ``9.0a``, and ``9.0+PTX`` where code that a
later GPU's driver can compile is to be added.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from fbopt._build.nvcc import Toolkit, accepts
from fbopt._build.compiler import BuildError, run

# What torch's own builds hold; code for one architecture runs on later ones of the same major.
COMMON = ("7.0", "7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
# The names that torch's extension builder takes.
NAMES = {
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0 5.2+PTX",
    "Pascal": "6.0 6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
    "Rubin": "10.7+PTX",
}
SPELLING = "write architectures such as TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX', or unset it"


def architectures(tools: Toolkit) -> tuple[str, ...]:
    """Return what to build for: TORCH_CUDA_ARCH_LIST, else the visible GPUs', else the common ones.

    Raises:
        BuildError: the list cannot be read, or this nvcc does not know an architecture.
    """
    known = known_architectures(tools)
    words = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,\t\n"))
    if words == [""]:
        return visible(known) or common(known)
    found = dict.fromkeys(one for word in words for one in _expand(word, known))
    for architecture in found:
        _require(architecture, known, tools)
    return tuple(found)


def gencode(architectures: Sequence[str]) -> list[str]:
    """Return nvcc's flags for these architectures."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def known_architectures(tools: Toolkit) -> tuple[str, ...]:
    """Return all that this nvcc knows, oldest first."""
    said = run([str(tools.nvcc), "--list-gpu-arch"])
    numbers = sorted({int(n) for n in re.findall(r"^compute_(\d+)$", said.stdout, re.MULTILINE)})
    if not numbers:
        cause = f"{tools.nvcc} --list-gpu-arch names no architecture ({said.stderr.strip()})"
        raise BuildError(cause, "install the CUDA toolkit anew")
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


def visible(known: Sequence[str]) -> tuple[str, ...]:
    """Return the architectures of the visible GPUs, each once.

    For a GPU later than all that nvcc knows it is the last known one's PTX.
    """
    import torch

    count = torch.cuda.device_count()
    found = {"{}.{}".format(*torch.cuda.get_device_capability(gpu)) for gpu in range(count)}
    return tuple(dict.fromkeys(_nearest(one, known) for one in sorted(found, key=_order)))


def common(known: Sequence[str]) -> tuple[str, ...]:
    """Return the usual architectures that nvcc knows, with PTX for the newest."""
    return _with_ptx([one for one in COMMON if one in known] or known[-1:])


def _nearest(architecture: str, known: Sequence[str]) -> str:
    if architecture in known:
        return architecture
    older = [one for one in known if _order(one) < _order(architecture)]
    if not older:
        cause = f"nvcc knows {', '.join(known)}, but not the GPU's architecture {architecture}"
        raise BuildError(cause, "install an older CUDA toolkit and a torch built with it")
    return f"{older[-1]}+PTX"


def _expand(word: str, known: Sequence[str]) -> Sequence[str]:
    """Replace a name by the architectures that it stands for."""
    if word == "native":
        if found := visible(known):
            return found
        raise BuildError("TORCH_CUDA_ARCH_LIST is native, but no GPU is visible", SPELLING)
    plain = word.removesuffix("+PTX")
    named = {name: numbers.split() for name, numbers in NAMES.items()}
    named |= {"All": _with_ptx(known), "Common": common(known)}
    found = named.get(plain, [plain])
    return found if word == plain else _with_ptx(found)


def _with_ptx(architectures: Sequence[str]) -> tuple[str, ...]:
    *rest, last = architectures
    return (*rest, f"{last.removesuffix('+PTX')}+PTX")


def _require(architecture: str, known: Sequence[str], tools: Toolkit) -> None:
    """Refuse what cannot be read, and what this nvcc does not know."""
    match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", architecture)
    if not match:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST has {architecture!r}", SPELLING)
    # Which ones have an a or an f is not in nvcc's list.
    if match[1] not in known or (match[2] and not accepts(tools, gencode([architecture]))):
        cause = f"TORCH_CUDA_ARCH_LIST has {architecture}, which nvcc {tools.release} does not know"
        cure = "correct or unset TORCH_CUDA_ARCH_LIST"
        raise BuildError(f"{cause} (it knows {', '.join(known)})", cure)


def _order(architecture: str) -> tuple[int, ...]:
    return tuple(int(part) for part in architecture.split("."))
