"""The C++ compiler and its flags, ninja, pybind11, Python's headers, and parallel jobs.

Anything missing raises a ``BuildError`` with cause and cure. Nothing is compiled here, and torch is
not imported.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

COMPILERS = ("c++", "g++", "clang++")
INSTALL_COMPILER = "install one (apt install g++, dnf install gcc-c++, xcode-select --install, …)"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra "
    # No vector type is passed between libraries.
    "-Wno-psabi "
    # No fused multiply-add unless written: the bits have to be the reference's.
    "-ffp-contract=off -fno-math-errno -fno-trapping-math " + TORCH_TARGET
)
# Instruction sets in a wheel, one library each, widest first, by their names in
# torch.backends.cpu.get_cpu_capability().
_AVX2 = "-march=x86-64 -mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
TARGETS = {"default": ""}
NATIVE = {"aarch64": "-mcpu=native", "arm64": "-mcpu=native"}.get(platform.machine(), "")
if platform.machine() == "x86_64":
    TARGETS = {"avx512": _AVX512, "avx2": _AVX2, "default": "-march=x86-64"}
    NATIVE = "-march=native"
# Twice the peak memory of one compilation, by g++ or by nvcc.
BYTES_PER_JOB = 10**9


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded; the message gives the cause and the cure."""

    def __init__(self, cause: str, cure: str):
        super().__init__(cause, cure)
        self.cause, self.cure = cause, cure

    def __str__(self) -> str:
        return f"{self.cause}; {self.cure}"


@dataclass(frozen=True)
class Toolchain:
    """A compiler, its flags, and all macros that it predefines with these flags.

    The macros tell the compiler's version and what ``native`` means on this processor.
    """

    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    macros: str

    @property
    def name(self) -> str:
        """The compiler and its version, such as ``g++ 12.2.0``."""
        family = "clang" if "__clang__" in self.macros else "g++"
        version = re.search(r'__VERSION__ ".*?(\d[\d.]*)', self.macros)
        return f"{family} {version[1] if version else '?'}"

    @property
    def program(self) -> str:
        """The compiler's path, without options or a launcher such as ccache."""
        word = [word for word in self.compiler if not word.startswith("-")][-1]
        return shutil.which(word) or word


def toolchain(target: str = "native") -> Toolchain:
    """Find the compiler and ask for its version and instruction set.

    CXX names the compiler; CXXFLAGS are added to the flags; FBOPT_WERROR=1 turns warnings into
    errors.

    Args:
        target: one of TARGETS, or ``"native"`` for this machine's processor.

    Raises:
        BuildError: there is no compiler, or it does not know C++20 or a flag.
    """
    compiler = find_compiler()
    flags = [*FLAGS.split(), *(NATIVE if target == "native" else TARGETS[target]).split()]
    flags += ["-Werror"] if os.environ.get("FBOPT_WERROR", "0") not in ("", "0") else []
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    probe = run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    if probe.returncode != 0:
        said = (probe.stderr or probe.stdout).strip() or f"exit status {probe.returncode}"
        raise BuildError(f"{shlex.join(compiler)} does not compile C++20 ({said})", "update it")
    return Toolchain(tuple(compiler), tuple(flags), probe.stdout)


def find_compiler() -> list[str]:
    """Return the compiler's command, its path first."""
    if os.name != "posix":
        raise BuildError("the kernels are built on Linux and macOS only", "on Windows, use WSL")
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    if chosen:
        raise BuildError(f"CXX names {chosen[0]!r}, not found on the PATH", "correct or unset CXX")
    raise BuildError(f"no C++ compiler (tried {', '.join(COMPILERS)})", INSTALL_COMPILER)


def require(package: str) -> ModuleType:
    """Import a Python package that brings a tool or headers: ninja or pybind11."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BuildError(f"no {package}", f"pip install {package}") from error


def find_headers() -> str:
    """Return the folder of Python's own headers."""
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").exists():
        cure = "install them (Debian, Ubuntu: apt install python3-dev; Fedora: python3-devel)"
        raise BuildError(f"no Python headers ({folder}/Python.h)", cure)
    return folder


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # missing on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def jobs() -> int:
    """Return how many files to compile at a time: MAX_JOBS or the cores, as memory allows."""
    words = os.environ.get("MAX_JOBS", "").strip()
    if words and not (words.isdecimal() and int(words) > 0):
        raise BuildError(f"MAX_JOBS is {words!r}", "set MAX_JOBS to a positive number, or unset it")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(int(words or cores()), memory // BYTES_PER_JOB))


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a tool with no input and messages in English, and capture its output."""
    try:
        return subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error.strerror})", "reinstall it") from error
