"""``fbopt doctor``: what was found, what will be used, and what to do about what is missing.

It compiles nothing, and tells of anything broken in a line of its report, not by a traceback.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fbopt
from fbopt._build import compiler as _toolchain
from fbopt._build import doctor_cuda as _doctor_cuda
from fbopt._build import jobs as _jobs
from fbopt._build import load as _build
from fbopt._build import toolkit as _toolkit
from fbopt._build.cache import cache_folder, tilde
from fbopt._build.compiler import BuildError

OLDEST_TORCH = (2, 10)
INSTALL_TORCH = "pip install 'torch>=2.10'"


@dataclass(frozen=True)
class Kernels:
    """The libraries that are there already, and whether the CUDA one is wanted."""

    cpu: Path | None
    cuda: Path | None
    cuda_wanted: bool

    @property
    def complete(self) -> bool:
        """Whether nothing has to be compiled, so that no tool is missing."""
        return self.cpu is not None and (self.cuda is not None or not self.cuda_wanted)


class Examination:
    """The lines of the report, and what is to be done, gathered finding by finding."""

    def __init__(self):
        self.lines: list[tuple[str, str]] = []
        self.cures: list[str] = []

    def look(self, what: str, find: Callable[[], str], needed: bool = True) -> bool:
        """Add what ``find`` returns, or the cause and the cure that its exception names."""
        try:
            self.lines.append((what, find()))
            return True
        except Exception as error:  # whatever is broken here is what the report is for
            text = " ".join(str(error).split()) or type(error).__name__
            cause, _, cure = text.partition("; ")
            cause, cure = getattr(error, "cause", cause), getattr(error, "cure", cure)
            self.lines.append((what, cause if needed else f"{cause} (not needed)"))
            if needed:
                self.cures.append(f"{what}: {cure or 'mend this'}")
            return False

    def show(self) -> None:
        """Print the report, a finding a line."""
        print(f"fbopt {fbopt.__version__}")
        width = shutil.get_terminal_size((100, 24)).columns
        cures = [("to do", cure) for cure in self.cures or ["nothing"]]
        for what, found in self.lines + cures:
            line = f"  {what:<11} {found}"
            lines = textwrap.wrap(line, width, subsequent_indent=" " * 14, break_on_hyphens=False)
            print("\n".join(lines))


def main() -> int:
    """Print the report; return 0 if fbopt can work as it is asked to, else 1."""
    report, kernels = Examination(), _kernels()
    needed = not kernels.complete
    tools = {"compiler": _compiler, "ninja": _toolchain.find_ninja, "pybind11": _pybind11}
    found = [report.look("Python", _python, needed), report.look("torch", _torch)]
    torch = found[-1]
    found += [report.look(what, find, needed) for what, find in tools.items()]
    able = all(found)
    report.look("processor", _processor)
    report.look("GPU", _doctor_cuda.gpu) if torch else None
    able_cuda = able and kernels.cuda_wanted and _examine_toolkit(report, kernels.cuda is None)
    report.look("cache", lambda: _cache(kernels)) if able or kernels.complete else None
    works = torch and report.look("in use", lambda: _in_use(kernels, able))
    if torch and _quietly(_doctor_cuda.is_shown):
        cpu = able or kernels.cpu is not None
        on_cuda = functools.partial(_doctor_cuda.in_use, cpu, kernels.cuda, able_cuda)
        works = report.look("on CUDA", on_cuda) and works
    report.show()
    return 0 if works else 1


def _kernels() -> Kernels:
    wanted = bool(_quietly(_toolkit.wanted))
    cuda = _quietly(_build.find_cuda) if wanted else None
    return Kernels(_quietly(_build.find_kernels), cuda, wanted)


def _examine_toolkit(report: Examination, needed: bool) -> bool:
    return report.look("toolkit", _doctor_cuda.toolkit, needed) and report.look(
        "built for", _doctor_cuda.built_for, needed
    )


def _quietly(find: Callable[[], Any]) -> Any:
    """Return what is found; what is broken has a line of its own in the report."""
    with contextlib.suppress(Exception), warnings.catch_warnings(record=True):
        return find()


def _python() -> str:
    return f"{platform.python_version()}, headers in {tilde(Path(_toolchain.find_headers()))}"


def _torch() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BuildError(f"does not import ({error})", INSTALL_TORCH) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise BuildError(f"{torch.__version__} is too old", INSTALL_TORCH)
    build = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"{torch.__version__}, built {build}"


def _compiler() -> str:
    tools = _toolchain.toolchain()
    return f"{tools.name} ({shlex.join(tools.compiler)})"


def _pybind11() -> str:
    return _toolchain.find_pybind11().__version__


def _processor() -> str:
    cores = f"{os.cpu_count()} cores"
    if torch := sys.modules.get("torch"):
        cores += f", {torch.get_num_threads()} threads in use"
    try:
        recipe = _build.cpu_recipe()
    except BuildError:
        return f"{platform.machine()}, {cores}"
    at_once, free = _toolkit.jobs(recipe.gigabytes_per_job), _jobs.memory() / 1e9
    return (
        f"{recipe.tools.instruction_set}, {cores}; {free:.0f} GB free, so {at_once} files at once"
    )


def _cache(kernels: Kernels) -> str:
    folder = cache_folder()
    libraries = {"the kernels for this machine": kernels.cpu}
    libraries |= {"the CUDA kernels": kernels.cuda} if kernels.cuda_wanted else {}
    held = [name for name, path in libraries.items() if path and path.parent == folder]
    missing = [name for name, path in libraries.items() if not path]
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if missing and not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise BuildError(f"{tilde(folder)} is not writable", "set FBOPT_CACHE_DIR to one that is")
    words = [f"with {' and '.join(held)}"] if held else []
    words += [f"without {' and '.join(missing)} so far"] if missing else []
    return ", ".join([tilde(folder), *(words or ["not used"])])


def _in_use(kernels: Kernels, able: bool) -> str:
    asked = _build.requested_backend()
    if asked == "reference":
        return "plain torch, as FBOPT_BACKEND asks"
    why = ", as FBOPT_BACKEND asks" if asked else ""
    if kernels.cpu:
        return f"the kernels{why}{_doctor_cuda.whence(kernels.cpu)}"
    if able:
        return f"the kernels{why}, compiled at first use in half a minute"
    if asked == "kernels":
        cure = "unset FBOPT_BACKEND to use plain torch"
        raise BuildError("nothing: FBOPT_BACKEND asks for the kernels", cure)
    return "plain torch, as the kernels cannot be compiled"


if __name__ == "__main__":
    sys.exit(main())
