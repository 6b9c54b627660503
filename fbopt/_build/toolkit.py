"""The CUDA toolkit to build with, the first that fits torch, and whether to build with it at all.

Looked for by CUDA_HOME or CUDA_PATH; without them on the PATH, among Python's packages (PyPI has
an nvcc) and in the usual place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fbopt._build.architectures import architectures, gencode
from fbopt._build.jobs import jobs
from fbopt._build.nvcc import Toolkit, inspect
from fbopt._build.compiler import BuildError

__all__ = ["Toolkit", "architectures", "gencode", "jobs", "toolkit", "wanted"]

VARIABLES = ("CUDA_HOME", "CUDA_PATH")
USUAL = Path("/usr/local/cuda")
# The first that hands a kernel 32 KB of arguments: the tables of tensors.
OLDEST = (12, 1)
# The first CUDA of which PyPI has all of nvcc.
FIRST_PACKAGED = 13


def wanted() -> bool:
    """Return whether to use CUDA: as FBOPT_CUDA says, or else whether torch sees a GPU."""
    choice = os.environ.get("FBOPT_CUDA") or None
    if choice not in (None, "0", "1"):
        raise ValueError(f"FBOPT_CUDA is {choice!r}; set it to 1 or 0, or unset it")
    if choice:
        return choice == "1"
    import torch

    # On ROCm, too, torch.cuda is available.
    return torch.version.cuda is not None and torch.cuda.is_available()


def toolkit() -> Toolkit:
    """Return the first toolkit of the CUDA version that torch was built with; minors may differ.

    Raises:
        BuildError: there is none, or CUDA_HOME is wrong, or torch was built without CUDA.
    """
    cuda, packaged = _torch_cuda(), _packaged()
    misfits = []
    for origin, nvcc in _candidates():
        # A virtual environment's nvcc can go with headers of the Python that it extends.
        homes = packaged if nvcc.parent.parent in packaged else []
        try:
            tools = inspect(nvcc, origin, homes)
        except BuildError as error:
            misfits.append(error.cause)
            continue
        if tools.version[0] == _major(cuda) and tools.version >= OLDEST:
            return tools
        misfits.append(f"{nvcc} is of CUDA {tools.release}")
    raise _nothing_fits(cuda, misfits)


def _torch_cuda() -> str:
    import torch

    if not torch.version.cuda:
        cause = f"torch {torch.__version__} was built without CUDA"
        raise BuildError(cause, "install one with CUDA (https://pytorch.org/get-started/locally)")
    return torch.version.cuda


def _candidates() -> Iterator[tuple[str, Path]]:
    """Yield each nvcc there is and what it was found through, the preferred first."""
    if variable := _variable():
        # Asked for: if it is not there, that is to be told.
        yield variable, Path(os.environ[variable], "bin", "nvcc").absolute()
        return
    places = [("nvcc on the PATH", Path(folder)) for folder in os.get_exec_path()]
    places += [("nvcc among Python's packages", home / "bin") for home in _packaged()]
    places += [("its usual place", USUAL / "bin")]
    seen = set()
    for origin, folder in places:
        nvcc = (folder / "nvcc").absolute()
        if nvcc.is_file() and os.access(nvcc, os.X_OK) and nvcc.resolve() not in seen:
            seen.add(nvcc.resolve())
            yield origin, nvcc


def _variable() -> str | None:
    return next((name for name in VARIABLES if os.environ.get(name)), None)


def _packaged() -> list[Path]:
    """Return the toolkits' folders among Python's packages, such as nvidia/cu13.

    By the path alone: an ``__init__.py`` that CUDA 12's packages put into one ``nvidia`` would hide
    all others from an import.
    """
    return [home for folder in sys.path for home in sorted(Path(folder).glob("nvidia/cu[0-9]*"))]


def _nothing_fits(cuda: str, misfits: Sequence[str]) -> BuildError:
    if variable := _variable():
        cause = f"{variable} is set to {os.environ[variable]}, but {misfits[0]}"
        if "is of CUDA" in misfits[0]:
            cause += f", and torch of CUDA {cuda}"
        least = ", 12.1 at the least" if _major(cuda) == OLDEST[0] else ""
        cure = f"set {variable} to the folder of a CUDA {_major(cuda)} toolkit{least}, or unset it"
        return BuildError(cause, cure)
    places = f"CUDA_HOME is not set; tried the PATH, Python's packages and {USUAL}"
    found = "".join(f"; {misfit}" for misfit in misfits)
    return BuildError(f"no CUDA toolkit for torch's CUDA {cuda} ({places}{found})", _install(cuda))


def _install(cuda: str) -> str:
    if _major(cuda) < FIRST_PACKAGED:
        newer = f"a torch built with CUDA {FIRST_PACKAGED}, for which PyPI has one"
        return f"install NVIDIA's CUDA toolkit {cuda} and set CUDA_HOME to it, or {newer}"
    package = f"pip install 'cuda-toolkit[nvcc,cccl]=={cuda}.*'"
    return f"{package}, or install NVIDIA's CUDA toolkit {cuda} and set CUDA_HOME to it"


def _major(version: str) -> int:
    return int(version.split(".")[0])
