"""``fbopt doctor``: what was found, what will be used, and what to do about what is missing.

It compiles nothing, and tells of anything broken in a line of its report, not by a traceback.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import fbopt
from fbopt import _build, _toolchain
from fbopt._toolchain import BuildError

OLDEST_TORCH = (2, 10)
INSTALL_TORCH = "pip install 'torch>=2.10'"


class Examination:
    """The lines of the report, and what is to be done, gathered finding by finding."""

    def __init__(self):
        self.lines: list[tuple[str, str]] = []
        self.cures: list[str] = []

    def look(self, what: str, find: Callable[[], str]) -> bool:
        """Add what ``find`` returns, or the cause and the cure that its exception names."""
        try:
            found = find()
        except Exception as error:  # whatever is broken here is what the report is for
            text = " ".join(str(error).split()) or type(error).__name__
            self.lines.append((what, getattr(error, "cause", text)))
            self.cures.append(f"{what}: {getattr(error, 'cure', 'mend this')}")
            return False
        self.lines.append((what, found))
        return True

    def show(self) -> None:
        """Print the report, a finding a line."""
        print(f"fbopt {fbopt.__version__}")
        width = shutil.get_terminal_size((100, 24)).columns
        cures = [("to do", cure) for cure in self.cures or ["nothing"]]
        for what, found in self.lines + cures:
            print(textwrap.fill(f"  {what:<11} {found}", width, subsequent_indent=" " * 14))


def main() -> int:
    """Print the report; return 0 if fbopt can work as it is asked to, else 1."""
    report = Examination()
    parts = {
        "Python": _python,
        "torch": _torch,
        "compiler": _compiler,
        "ninja": _toolchain.find_ninja,
        "pybind11": _pybind11,
    }
    found = {what: report.look(what, find) for what, find in parts.items()}
    report.look("processor", _processor)
    report.look("GPU", _gpu) if found["torch"] else None
    able = all(found.values())
    report.look("cache", _cache) if able else None
    works = report.look("in use", lambda: _in_use(able)) if found["torch"] else False
    report.show()
    return 0 if works else 1


def _python() -> str:
    return f"{platform.python_version()}, headers in {_tilde(_toolchain.find_headers())}"


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
        return f"{_toolchain.toolchain().instruction_set}, {cores}"
    except _toolchain.BuildError:
        return f"{platform.machine()}, {cores}"


def _gpu() -> str:
    import torch

    with warnings.catch_warnings(record=True) as said:
        if torch.cuda.is_available():
            return f"{torch.cuda.get_device_name()} (its tensors use plain torch)"
    return f"none ({str(said[0].message).splitlines()[0]})" if said else "none"


def _cache() -> str:
    folder = _build.cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if _library():
        return f"{_tilde(folder)}, with the kernels for this machine"
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise BuildError(f"{_tilde(folder)} is not writable", "set FBOPT_CACHE_DIR to one that is")
    return f"{_tilde(folder)}, without the kernels so far"


def _library() -> Path | None:
    return _build.find("_C", _build.sources())


def _in_use(able: bool) -> str:
    try:
        asked = _build.requested_backend()
    except ValueError as error:
        raise BuildError(*str(error).split("; ")) from error
    if asked == "reference":
        return "plain torch, as FBOPT_BACKEND asks"
    if asked == "kernels" and not able:
        cure = "unset FBOPT_BACKEND to use plain torch"
        raise BuildError("nothing: FBOPT_BACKEND asks for the kernels", cure)
    if not able:
        return "plain torch, as the kernels cannot be compiled"
    why = ", as FBOPT_BACKEND asks" if asked else ""
    return f"the kernels{why}" + ("" if _library() else ", compiled at first use in half a minute")


def _tilde(path: str | Path) -> str:
    return _build.tilde(Path(path))


if __name__ == "__main__":
    sys.exit(main())
