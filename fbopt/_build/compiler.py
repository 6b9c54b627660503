"""What there is to build with: the compiler and what it targets, ninja, pybind11, Python's headers.

Whatever is missing is a ``BuildError`` that names the cause and the cure. Nothing is compiled here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

COMPILERS = ("c++", "g++", "clang++")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra "
    # No vector is handed from one library to another.
    "-Wno-psabi "
    # Every sum and product is rounded as it is written, so that the result is the reference's.
    "-ffp-contract=off -fno-math-errno -fno-trapping-math " + TORCH_TARGET
)
NATIVE = {
    "x86_64": "-march=native",
    "AMD64": "-march=native",
    "aarch64": "-mcpu=native",
    "arm64": "-mcpu=native",
}
# What a wheel is compiled for, each a library of its own, the widest first. The names are those of
# torch.backends.cpu.get_cpu_capability(), and so is what they ask of a processor.
_AVX2 = "-march=x86-64 -mavx2 -mfma -mf16c"
TARGETS = {
    "x86_64": {
        "avx512": f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq",
        "avx2": _AVX2,
        "default": "-march=x86-64",
    },
}
# Widest first: the macro by which the compiler tells what "native" came to, and its name.
INSTRUCTION_SETS = {
    "__AVX512F__": "avx512",
    "__AVX2__": "avx2",
    "__AVX__": "avx",
    "__SSE2__": "sse2",
    "__ARM_FEATURE_SVE": "sve",
    "__ARM_NEON": "neon",
}
INSTALL_COMPILER = (
    "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install; conda: conda install cxx-compiler)"
)
INSTALL_HEADERS = (
    "install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
)


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here, for this cause, with that cure."""

    def __init__(self, cause: str, cure: str):
        super().__init__(cause, cure)
        self.cause, self.cure = cause, cure

    def __str__(self) -> str:
        return f"{self.cause}; {self.cure}"


@dataclass(frozen=True)
class Toolchain:
    """A compiler, the flags it is given, and all the macros it defines under them.

    The macros say which version it is and what ``native`` means on this processor.
    """

    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    macros: str

    @property
    def name(self) -> str:
        """The compiler and its version, such as ``g++ 12.2.0``."""
        value = dict(line.split(" ", 2)[1:] for line in self.macros.splitlines())
        name, parts = "g++", ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__")
        if "__clang__" in value:
            name, parts = "clang", ("__clang_major__", "__clang_minor__", "__clang_patchlevel__")
        return f"{name} {'.'.join(value.get(part, '?') for part in parts)}"

    @property
    def bare(self) -> str:
        """The compiler's path, without a launcher such as ccache before it and options after."""
        word = [word for word in self.compiler if not word.startswith("-")][-1]
        return shutil.which(word) or word

    @property
    def instruction_set(self) -> str:
        """The widest instruction set that the flags turn on, such as ``avx2``."""
        words = set(self.macros.split())
        return next((name for macro, name in INSTRUCTION_SETS.items() if macro in words), "generic")


def targets() -> dict[str, str]:
    """Return what a wheel for this kind of processor is compiled for, widest first, and how."""
    return TARGETS.get(platform.machine(), {"default": ""})


def toolchain(target: str = "native") -> Toolchain:
    """Find the compiler, named by CXX or usual, and ask it what it is and what it builds for.

    CXXFLAGS are added to the flags; FBOPT_WERROR=1 turns warnings into errors.

    Args:
        target: one of ``targets()``, or ``"native"`` for the processor at hand.

    Raises:
        BuildError: there is no compiler, or it does not know C++20 or a flag.
    """
    compiler = find_compiler()
    chosen = NATIVE.get(platform.machine(), "") if target == "native" else targets()[target]
    flags = [*FLAGS.split(), *chosen.split()]
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
        raise BuildError("the kernels are built on Linux and macOS alone", "on Windows, use WSL")
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    if chosen:
        raise BuildError(f"CXX names {chosen[0]!r}, not found on the PATH", "correct or unset CXX")
    raise BuildError(f"no C++ compiler (tried {', '.join(COMPILERS)})", INSTALL_COMPILER)


def find_ninja() -> str:
    """Return the path of ninja: the Python package's, or else the one on the PATH."""
    folders = [None]
    with contextlib.suppress(ImportError):
        import ninja

        folders.insert(0, ninja.BIN_DIR)
    for folder in folders:
        if path := shutil.which("ninja", path=folder):
            return path
    raise BuildError("no ninja", "pip install ninja")


def find_pybind11() -> ModuleType:
    """Import pybind11, which brings its headers and its version."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("no pybind11", "pip install pybind11") from error
    return pybind11


def find_headers() -> str:
    """Return the folder of Python's own headers."""
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").exists():
        raise BuildError(f"no Python headers ({folder}/Python.h)", INSTALL_HEADERS)
    return folder


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a tool with no input and its messages in English, and capture what it says."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
