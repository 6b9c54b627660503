"""One nvcc and what belongs to it: its version, and where its headers and libcudart really are.

nvcc is asked itself, by a dry run: that sees through links, wrapper scripts and ccache.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fbopt._build.compiler import BuildError, run, toolchain

# A toolkit has folders of its own for each kind of processor; Debian's libraries are in the last.
TARGETS = {"aarch64": ("sbsa-linux", "aarch64-linux")}.get(platform.machine(), ("x86_64-linux",))
INCLUDES = ("include", *(f"targets/{target}/include" for target in TARGETS))
LIBRARIES = ("lib64", "lib", *(f"targets/{target}/lib" for target in TARGETS))
LIBRARIES += (f"lib/{platform.machine()}-linux-gnu",)
# What a .cu file needs of each part: the runtime, the compiler, and CCCL, which has two folders.
HEADERS = ("cuda_runtime.h", "crt/host_config.h", "nv/target", "cuda/std/version")
CUDART = "libcudart.so"
# Compilers search it without being told; named again, it would come before the C++ library's.
SYSTEM = Path("/usr/include")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit with all that a build needs.

    Attributes:
        nvcc: what to call; a wrapper stays one, as it may set what its nvcc needs.
        home: the folder that the headers belong to.
        include: the folder with cuda_runtime.h.
        cudart: the shared library to link against.
        version: nvcc's, such as (13, 0).
        includes: the folders that nvcc and the host compiler need, except the system's own.
        origin: what it was found through.
    """

    nvcc: Path
    home: Path
    include: Path
    cudart: Path
    version: tuple[int, int]
    includes: tuple[Path, ...]
    origin: str = ""

    @property
    def release(self) -> str:
        """The version as it is written, such as ``13.0``."""
        return ".".join(map(str, self.version))


def inspect(nvcc: Path, origin: str = "", homes: Sequence[Path] = ()) -> Toolkit:
    """Ask nvcc for its version and its folders, and look for all the parts in them.

    Args:
        nvcc: a program or a link to one.
        origin: what it was found through, for the ``Toolkit``.
        homes: folders in which parts can be as well.

    Raises:
        BuildError: nvcc does not run, or a part is missing.
    """
    release = re.search(r"release (\d+)\.(\d+)", _ask(nvcc, "--version").stdout)
    if not release:
        raise BuildError(f"{nvcc} --version tells no version", "install the CUDA toolkit anew")
    version = (int(release[1]), int(release[2]))
    program, profile = _profile(nvcc)
    homes = [Path(profile["TOP"]), program.resolve().parent.parent, *homes]
    headers, cudart = _headers(profile, homes), _cudart(profile, homes, version[0])
    missing = [name for name, found in {**headers, CUDART: cudart}.items() if not found]
    if missing:
        cause = f"{nvcc} (CUDA {release[1]}.{release[2]}) comes without {', '.join(missing)}"
        raise BuildError(cause, "install the rest of the CUDA toolkit")
    include, *others = dict.fromkeys(headers.values())
    includes = tuple(folder for folder in (include, *others) if folder != SYSTEM)
    return Toolkit(program, _home(include), include, cudart, version, includes, origin)


def check_host(tools: Toolkit) -> None:
    """Let the host compiler read nvcc's headers, which refuse a compiler that is too new.

    Raises:
        BuildError: they do, or the two do not work together for another reason.
    """
    said = _dry(tools.nvcc, "-E")
    if said.returncode == 0:
        return
    lines = [line for line in said.stderr.splitlines() if "error" in line or "fatal" in line]
    reason = "".join(lines[:1]).rpartition("error -- ")[2].partition("! The nvcc flag")[0]
    cause = f"nvcc {tools.release} does not work with {toolchain().name} ({reason})"
    raise BuildError(cause, "set CXX to an older compiler, or update the CUDA toolkit")


def accepts(tools: Toolkit, flags: Sequence[str]) -> bool:
    """Return whether nvcc knows the architectures that its flags name."""
    said = _dry(tools.nvcc, "--dryrun", *flags)
    return "Unsupported gpu architecture" not in said.stdout + said.stderr


def _profile(nvcc: Path) -> tuple[Path, dict[str, str]]:
    """Return what has to be called, and the variables that nvcc's profile sets by then.

    Through a link nvcc misses its profile; a link to ccache, though, works as nvcc alone.
    """
    for program in dict.fromkeys((nvcc, nvcc.resolve())):
        said = _dry(program, "--dryrun")
        found = dict(re.findall(r"^#\$ (\w+)=(.*)$", said.stdout + said.stderr, re.MULTILINE))
        if "TOP" in found:
            return program, found
    reason = " ".join(said.stderr.split())[-200:] or f"exit status {said.returncode}"
    cause = f"{nvcc} --dryrun does not tell its folders ({reason})"
    raise BuildError(cause, "install the CUDA toolkit anew")


def _headers(profile: dict[str, str], homes: Sequence[Path]) -> dict[str, Path | None]:
    """Return the folder of each of HEADERS."""
    folders = _named(profile, "INCLUDES") + _named(profile, "SYSTEM_INCLUDES")
    folders += [home / name for home in homes for name in INCLUDES]
    folders += [folder / "cccl" for folder in folders]
    return {name: _holder(folders, name) for name in HEADERS}


def _cudart(profile: dict[str, str], homes: Sequence[Path], major: int) -> Path | None:
    """Return the shared library; PyPI's has no name without a number."""
    folders = _named(profile, "LIBRARIES")
    folders += [home / name for home in homes for name in LIBRARIES]
    found = ((_holder(folders, name), name) for name in (CUDART, f"{CUDART}.{major}"))
    return next((folder / name for folder, name in found if folder), None)


def _named(profile: dict[str, str], variable: str) -> list[Path]:
    """Return the folders in a variable of compiler flags."""
    words = [word for word in shlex.split(profile.get(variable, "")) if word != "-isystem"]
    return [Path(word.removeprefix("-I").removeprefix("-L")) for word in words]


def _holder(folders: Sequence[Path], name: str) -> Path | None:
    """Return the first folder that has the file, links followed."""
    return next((folder.resolve() for folder in folders if (folder / name).is_file()), None)


def _home(include: Path) -> Path:
    parent = include.parent
    return parent.parent.parent if parent.parent.name == "targets" else parent


def _dry(nvcc: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run nvcc with the host compiler on an empty file; ``flags`` say how far."""
    return _ask(nvcc, "-ccbin", toolchain().bare, *flags, "-x", "cu", os.devnull)


def _ask(nvcc: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    try:
        return run([str(nvcc), *flags])
    except OSError as error:
        cause = f"{nvcc} does not run ({error.strerror})"
        raise BuildError(cause, "install the CUDA toolkit anew") from error
