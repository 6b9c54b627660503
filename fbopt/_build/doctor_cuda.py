"""The doctor on CUDA: the GPU, the toolkit, what would be built from it, what will be used."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from pathlib import Path

from fbopt._build import load as _build, nvcc as _nvcc, toolkit as _toolkit, wheel as _prebuilt
from fbopt._build.cache import tilde
from fbopt._build.compiler import BuildError

DRIVER = Path("/proc/driver/nvidia/version")
INSTALL_CUDA_TORCH = "install a torch with CUDA (https://pytorch.org/get-started/locally)"
UPDATE_DRIVER = "update NVIDIA's driver, or install a torch built with an older CUDA"


def gpu() -> str:
    """Name the GPUs that torch sees, or say why it sees none."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        names = _names() if available else {}
    trouble = next((str(one.message).splitlines()[0] for one in said), "")
    if not available:
        return _no_gpu(trouble)
    found = ", ".join(f"{n} × {name}" if n > 1 else name for name, n in names.items())
    return found + _driver() + (f"; {trouble}" if trouble else "")


def toolkit() -> str:
    """Say which toolkit a build would take and why, and let it meet the host compiler."""
    import torch

    tools = _toolkit.toolkit()
    _nvcc.check_host(tools)
    found = f"CUDA {tools.release} in {tilde(tools.home)}, found through {tools.origin}"
    if not tools.nvcc.is_relative_to(tools.home):
        found += f" ({tilde(tools.nvcc)})"
    return f"{found}; torch has {torch.version.cuda}"


def built_for() -> str:
    """Say which architectures a build would be for, and why."""
    import torch

    architectures = ", ".join(_toolkit.architectures(_toolkit.toolkit()))
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return f"{architectures}, as TORCH_CUDA_ARCH_LIST asks"
    if torch.cuda.device_count():
        return f"{architectures}, as the visible GPUs are"
    return f"{architectures}: the usual ones, as no GPU is visible"


def is_shown() -> bool:
    """Whether CUDA tensors are worth a line: there is a GPU, or FBOPT_CUDA says something."""
    import torch

    return bool(os.environ.get("FBOPT_CUDA")) or torch.cuda.is_available()


def in_use(cpu: bool, library: Path | None, able: bool) -> str:
    """Say what computes on CUDA tensors.

    Args:
        cpu: whether the CPU kernels are used; the CUDA ones go with them.
        library: the CUDA kernels, if they are there.
        able: whether they can be compiled if not.
    """
    asked = _build.requested_backend()
    if asked == "reference":
        return "plain torch, as FBOPT_BACKEND asks"
    if not _toolkit.wanted():
        return "plain torch" + (", as FBOPT_CUDA asks" if os.environ.get("FBOPT_CUDA") else "")
    if cpu and (library or able):
        later = ", compiled at first use in some minutes"
        return f"the CUDA kernels{whence(library) if library else later}"
    for variable, value in (("FBOPT_BACKEND", "kernels"), ("FBOPT_CUDA", "1")):
        if os.environ.get(variable) == value:
            cause = f"not the CUDA kernels that {variable} asks for"
            raise BuildError(cause, f"see to the above, or unset {variable} to use plain torch")
    return "plain torch, as the CUDA kernels cannot be compiled"


def whence(library: Path) -> str:
    """Say whether the library came with the wheel; else it is in the cache, which says so."""
    return ", as the wheel brings them" if library.is_relative_to(_prebuilt.FOLDER) else ""


def _no_gpu(trouble: str) -> str:
    """Say why there is none; where there could be one that is a ``BuildError``."""
    import torch

    if trouble:
        raise BuildError(f"none that torch can use ({trouble})", UPDATE_DRIVER)
    if DRIVER.exists() and not torch.version.cuda:
        cause = f"there is one{_driver()}, but torch {torch.__version__} was built without CUDA"
        raise BuildError(cause, INSTALL_CUDA_TORCH)
    if DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise BuildError(f"none that torch sees{_driver()}", "see what nvidia-smi says")
    if os.environ.get("FBOPT_CUDA") == "1":
        return "none; the CUDA kernels are built all the same, as FBOPT_CUDA asks"
    return "none, so only the CPU part is built, and no CUDA toolkit is missing"


def _names() -> Counter[str]:
    """Count the visible GPUs by name and compute capability."""
    import torch

    gpus = [
        (torch.cuda.get_device_name(gpu), *torch.cuda.get_device_capability(gpu))
        for gpu in range(torch.cuda.device_count())
    ]
    return Counter(f"{name} ({major}.{minor})" for name, major, minor in gpus)


def _driver() -> str:
    match = re.search(r"\s(\d{3,}\.[\d.]+)\s", DRIVER.read_text()) if DRIVER.exists() else None
    return f", driver {match[1]}" if match else ""
