"""``fbopt doctor``: what this machine has, what fbopt uses, what is missing, and the cure.

It compiles nothing; whatever is broken is a line of the report, never a traceback.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import shutil
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fbopt
from fbopt._build import cache, compiler, cuda, load, wheel
from fbopt._build.compiler import BuildError

INSTALL_TORCH = "pip install 'torch>=2.10'"
DRIVER = Path("/proc/driver/nvidia/version")


class Report:
    """The findings, a line each, and cures for what is missing."""

    def __init__(self):
        self.lines, self.cures = [], []

    def add(self, what: str, find: Callable[[], str], needed: bool = True) -> bool:
        """Add what ``find`` returns, or the cause and the cure of its exception."""
        try:
            self.lines.append((what, find()))
            return True
        except Exception as error:  # whatever is broken here is what the report is for
            cause, _, cure = (" ".join(str(error).split()) or type(error).__name__).partition("; ")
            cause, cure = error.args if isinstance(error, BuildError) else (cause, cure)
            self.lines.append((what, cause if needed else f"{cause} (not needed)"))
            self.cures += [("to do", f"{what}: {cure or 'mend this'}")] if needed else []
            return False

    def show(self) -> None:
        """Print the report, a finding a line."""
        print(f"fbopt {fbopt.__version__}")
        width = shutil.get_terminal_size((100, 24)).columns
        for what, found in self.lines + (self.cures or [("to do", "nothing")]):
            line, indent = f"  {what:<11} {found}", " " * 14
            print(textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False))


def main() -> int:
    """Print the report; return 0 if fbopt works as it is asked to, else 1."""
    report = Report()
    report.add("Python", platform.python_version)
    works = report.add("torch", _torch) and _examine(report)
    report.show()
    return 0 if works else 1


def _examine(report: Report) -> bool:
    """Add the lines after torch's; return whether fbopt works as it is asked to."""
    wanted, cpu = _quietly(cuda.wanted), _quietly(load.find_kernels)
    gpu = _quietly(load.find_cuda) if wanted else None
    missing = not cpu or (wanted and not gpu)
    tools = {"compiler": _compiler, "ninja": lambda: compiler.require("ninja").__version__}
    tools["pybind11"] = lambda: compiler.require("pybind11").__version__
    able = all([report.add(what, find, missing) for what, find in tools.items()])
    report.add("processor", _processor)
    report.add("GPU", _gpu)
    able_cuda = wanted and able and report.add("toolkit", _toolkit, not gpu)
    report.add("cache", lambda: str(cache.writable(cache.cache_folder())))
    works = report.add("in use", lambda: _in_use("the kernels", cpu, able, "FBOPT_BACKEND"))
    if wanted or os.environ.get("FBOPT_CUDA"):
        # The CUDA kernels are used together with the CPU's or not at all.
        found, able_cuda = (gpu, able_cuda) if cpu or able else (None, False)
        asking = ("FBOPT_BACKEND", "FBOPT_CUDA")
        on_cuda = functools.partial(_in_use, "the CUDA kernels", found, able_cuda, *asking)
        works = report.add("on CUDA", on_cuda) and works
    return works


def _quietly(find: Callable[[], Any]) -> Any:
    """Return what ``find`` returns, or None on an error, which another line reports."""
    with contextlib.suppress(Exception), warnings.catch_warnings(record=True):
        return find()


def _torch() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BuildError(f"does not import ({error})", INSTALL_TORCH) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise BuildError(f"{torch.__version__} is too old", INSTALL_TORCH)
    cuda = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"{torch.__version__}, built {cuda}"


def _compiler() -> str:
    tools = compiler.toolchain()
    compiler.find_headers()  # the compiler needs them too
    return f"{tools.name} ({shlex.join(tools.compiler)})"


def _processor() -> str:
    import torch

    capability = torch.backends.cpu.get_cpu_capability().lower()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    return f"{capability}, {threads}, {compiler.jobs()} files compiled at a time"


def _gpu() -> str:
    """Name the GPUs that torch sees, or say why it sees none."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        names = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    if said:
        cause = f"none that torch can use ({str(said[0].message).splitlines()[0]})"
        raise BuildError(cause, "update NVIDIA's driver, or install a torch of an older CUDA")
    if DRIVER.exists() and not torch.version.cuda:
        cure = "install a torch with CUDA (https://pytorch.org/get-started/locally)"
        raise BuildError("one that torch, built without CUDA, does not use", cure)
    return "none that torch sees"


def _toolkit() -> str:
    tools = cuda.toolkit()
    return f"CUDA {tools.release} ({tools.nvcc}), for {', '.join(cuda.architectures(tools))}"


def _in_use(what: str, library: Path | None, able: bool, *variables: str) -> str:
    """Say what is in use; ``variables`` are the environment variables that can ask for it."""
    if load.requested_backend() == "reference":
        return "plain torch, as FBOPT_BACKEND asks"
    if "FBOPT_CUDA" in variables and not cuda.wanted():
        return "plain torch, as FBOPT_CUDA asks"
    if library:
        return f"{what}, {'of the wheel' if wheel.FOLDER in library.parents else 'in the cache'}"
    if able:
        return f"{what}, compiled at first use"
    for name in variables:
        if os.environ.get(name) in ("kernels", "1"):
            cure = f"see above, or unset {name} to use plain torch"
            raise BuildError(f"nothing: {name} asks for {what}", cure)
    return f"plain torch, as {what} cannot be compiled"
