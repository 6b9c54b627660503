"""The CUDA toolkit to build with, and the GPU architectures to build for.

CUDA_HOME or CUDA_PATH names the toolkit; if unset, it is searched for on the PATH, among Python's
packages (PyPI has an nvcc), and in /usr/local/cuda. Architectures are spelled as in torch: ``9.0``,
``9.0a``, and ``9.0+PTX`` to add code that the drivers of later GPUs can compile.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fbopt._build.compiler import BuildError, Toolchain, run, toolchain

USUAL = Path("/usr/local/cuda")
# As in torch's own builds; code for an architecture runs on later minors of its major.
COMMON = ("7.0", "7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
# The runtime's header and one of CCCL's, which the runtime's headers include; and the line in
# which a preprocessor names the folder of a header.
HEADERS = ("cuda_runtime.h", "nv/target")
FOUND = r'^# \d+ "(.*)/{}"'


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that works with the C++ compiler.

    Attributes:
        nvcc: the command to call; may be a wrapper script, which sets variables that nvcc needs.
        release: its version, such as ``13.0``.
        includes: the folders of the headers.
    """

    nvcc: Path
    release: str
    includes: tuple[Path, ...]


def wanted() -> bool:
    """Return whether to use CUDA: FBOPT_CUDA if set, or else whether torch sees a GPU."""
    choice = os.environ.get("FBOPT_CUDA") or None
    if choice not in (None, "0", "1"):
        raise ValueError(f"FBOPT_CUDA is {choice!r}; set it to 1 or 0, or unset it")
    if choice:
        return choice == "1"
    import torch

    # On ROCm, too, torch.cuda is available.
    return torch.version.cuda is not None and torch.cuda.is_available()


def toolkit() -> Toolkit:
    """Return the first working toolkit of torch's CUDA major version; minors may differ.

    Raises:
        BuildError: there is none or no C++ compiler, or torch was built without CUDA.
    """
    import torch

    if not (cuda := torch.version.cuda):
        cause = f"torch {torch.__version__} was built without CUDA"
        raise BuildError(cause, "install one with CUDA (https://pytorch.org/get-started/locally)")
    host, misfits = toolchain(), []
    for nvcc in _candidates():
        try:
            release = re.search(r"release ([\d.]+)", run([str(nvcc), "--version"]).stdout)
            if release and release[1].split(".")[0] == cuda.split(".")[0]:
                return _inspect(nvcc, release[1], host)
            misfits.append(f"{nvcc} is of CUDA {release[1] if release else 'unknown'}")
        except BuildError as error:
            misfits.append(error.cause)
    found = "; ".join(misfits) or f"none on the PATH, among Python's packages or in {USUAL}"
    cure = f"set CUDA_HOME to the folder of NVIDIA's CUDA toolkit {cuda}"
    if not cuda.startswith("12."):  # of which PyPI has no complete nvcc
        cure += f", or unset it and pip install 'cuda-toolkit[nvcc,cccl]=={cuda}.*'"
    raise BuildError(f"no CUDA toolkit for torch's CUDA {cuda} ({found})", cure)


def architectures(tools: Toolkit) -> tuple[str, ...]:
    """Return what to build for: TORCH_CUDA_ARCH_LIST, else the visible GPUs', else the common ones.

    Raises:
        BuildError: the list cannot be read, or this nvcc does not know an architecture.
    """
    import torch

    said = run([str(tools.nvcc), "--list-gpu-arch"])
    numbers = sorted(map(int, re.findall(r"^compute_(\d+)$", said.stdout, re.MULTILINE)))
    known = [f"{number // 10}.{number % 10}" for number in numbers] or COMMON
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,\t\n"))
    if asked in ([""], ["native"]):
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        found = dict.fromkeys(_nearest(gpu, known) for gpu in sorted(gpus))
        *common, last = [one for one in COMMON if one in known] or known
        return tuple(found) or (*common, f"{last}+PTX")
    for one in asked:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", one)
        if not match or match[1] not in known:
            cause = f"TORCH_CUDA_ARCH_LIST has {one!r}; nvcc {tools.release} knows "
            raise BuildError(cause + ", ".join(known), "set it to such as '8.0;9.0+PTX'")
    return tuple(dict.fromkeys(asked))


def _nearest(gpu: tuple[int, int], known: Sequence[str]) -> str:
    """Return the GPU's architecture, or if nvcc does not know it, PTX of the newest older one."""
    name = "{}.{}".format(*gpu)
    older = [one for one in known if tuple(map(int, one.split("."))) < gpu]
    return name if name in known or not older else f"{older[-1]}+PTX"


def gencode(architectures: Sequence[str]) -> list[str]:
    """Return nvcc's flags for these architectures."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if architecture.endswith("+PTX") else ("sm",)
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


def _candidates() -> list[Path]:
    """Return each nvcc there is, the preferred first."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return [Path(home, "bin", "nvcc").absolute()]
    folders = [*os.get_exec_path(), *(home / "bin" for home in _packaged()), USUAL / "bin"]
    paths = dict.fromkeys(Path(folder, "nvcc").absolute() for folder in folders)
    return [path for path in paths if os.access(path, os.X_OK)]


def _packaged() -> list[Path]:
    """Return the toolkits' folders among Python's packages, such as nvidia/cu13.

    By path: an ``__init__.py`` that CUDA 12's packages put into one ``nvidia`` folder would hide
    all others from an import.
    """
    return [home for folder in sys.path for home in sorted(Path(folder).glob("nvidia/cu[0-9]*"))]


def _inspect(nvcc: Path, release: str, host: Toolchain) -> Toolkit:
    """Preprocess an empty file: does nvcc work with the compiler, and where are its headers?

    Called through a symlink, nvcc does not find its own folders, but ccache needs its symlink.
    """
    # nvcc can be in a virtual environment, and the runtime, with torch, in its base Python.
    homes = [home for home in _packaged() if home.name == f"cu{release.split('.')[0]}"]
    extra = [home / name for home in homes for name in ("include", "include/cccl")]
    extra = extra if nvcc.parent.parent in homes else []
    flags = ["-std=c++20", "-ccbin", host.program, *(f"-isystem={folder}" for folder in extra)]
    flags += [word for header in HEADERS for word in ("-include", header)]
    for program in dict.fromkeys((nvcc, nvcc.resolve())):
        said = run([str(program), "-E", *flags, "-x", "cu", os.devnull])
        found = [re.search(FOUND.format(name), said.stdout, re.M) for name in HEADERS]
        if said.returncode == 0 and all(found):
            includes = dict.fromkeys(Path(match[1]).resolve() for match in found)
            return Toolkit(program, release, tuple(includes))
    lines = [line for line in said.stderr.splitlines() if "error" in line] or ["no reason given"]
    cause = f"{nvcc} (CUDA {release}) does not work with {host.name}, which CXX can change: "
    raise BuildError(cause + lines[0], "install the rest of the CUDA toolkit")
