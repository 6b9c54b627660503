"""The C++ compiler and its flags, ninja, pybind11, Python's headers, and parallel jobs.

Anything missing raises a ``BuildError`` with cause and cure. Nothing is compiled here, and torch is
not imported.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
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
MOST_MINUTES = 60 * 24 * 365  # a year
LIMITS = {"FBOPT_BUILD_MINUTES": 30.0, "FBOPT_WAIT_MINUTES": 60.0}
NEWS_SECONDS = 30.0  # after which it is told what is waited for
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
    flags += _words("CXXFLAGS")
    probe = run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    if probe.returncode != 0:
        said = (probe.stderr or probe.stdout).strip() or f"exit status {probe.returncode}"
        raise BuildError(f"{shlex.join(compiler)} does not compile C++20 ({said})", "update it")
    return Toolchain(tuple(compiler), tuple(flags), probe.stdout)


def find_compiler() -> list[str]:
    """Return the compiler's command, its path first."""
    if os.name != "posix":
        raise BuildError("the kernels are built on Linux and macOS only", "on Windows, use WSL")
    chosen = _words("CXX")
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    if chosen:
        raise BuildError(f"CXX names {chosen[0]!r}, not found on the PATH", "correct or unset CXX")
    raise BuildError(f"no C++ compiler (tried {', '.join(COMPILERS)})", INSTALL_COMPILER)


def _words(name: str) -> list[str]:
    """Return the words of an environment variable, as a shell would split them."""
    value = os.environ.get(name, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{name} is {value!r}: {error}", f"correct or unset {name}") from error


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
    if words and not (words.isdecimal() and len(words) < 10 and int(words) > 0):
        raise BuildError(f"MAX_JOBS is {words!r}", "set MAX_JOBS to a positive number, or unset it")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(int(words or cores()), memory // BYTES_PER_JOB))


def limit(name: str) -> float:
    """Return a limit in minutes: an environment variable, or its default in LIMITS."""
    words = os.environ.get(name, "").strip()
    try:
        minutes = float(words) if words else LIMITS[name]
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < MOST_MINUTES:
        raise BuildError(f"{name} is {words!r}", f"set {name} to a number of minutes, or unset it")
    return minutes


def run(command: Sequence[str], *, is_told: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a tool with no input and messages in English, and capture its output.

    Should it take long, say that it is waited for, unless that `is_told` already.

    Raises:
        BuildError: it does not start, or does not end within FBOPT_BUILD_MINUTES; then it and all
            that it has started are killed.
    """
    minutes = limit("FBOPT_BUILD_MINUTES")
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = {"text": True, "errors": "replace", "env": {**os.environ, "LC_ALL": "C"}}
    try:
        # Its own session: what it starts can be killed with it.
        process = subprocess.Popen(command, start_new_session=True, **streams, **words)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error.strerror})", "reinstall it") from error
    with process:  # closes its pipes, whatever happens
        try:
            out, err = _communicate(process, command[0], 60 * minutes, is_told)
        except subprocess.TimeoutExpired as error:
            cure = "find out what it waits for, or allow it more with FBOPT_BUILD_MINUTES"
            cause = f"{command[0]} has not ended after {minutes:g} minutes"
            raise BuildError(cause, cure) from error
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _communicate(
    process: subprocess.Popen[str], name: str, seconds: float, is_told: bool
) -> tuple[str, str]:
    news = seconds if is_told else min(NEWS_SECONDS, seconds / 2)
    try:
        return process.communicate(timeout=news)
    except subprocess.TimeoutExpired:
        if is_told:
            raise
    limit = f"for at most {seconds / 60:g} minutes"
    print(f"fbopt: waiting {limit} for {name}", file=sys.stderr, flush=True)
    return process.communicate(timeout=seconds - news)
