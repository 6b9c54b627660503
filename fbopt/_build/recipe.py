"""What a library is made of and how: its sources, compilers and flags, as a name for the cache and
as the rules that ninja follows.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fbopt._build import toolkit as _toolkit
from fbopt._build.cache import digest
from fbopt._build.compiler import TORCH_TARGET, Toolchain, find_headers, find_pybind11
from fbopt._build.toolkit import Toolkit

PACKAGE = Path(__file__).resolve().parents[1]
# Inside the package where it is installed, beside it in a checkout.
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE)
NVCC_FLAGS = (
    "-std=c++20 -O3 --expt-relaxed-constexpr "
    # A rule rounds where it is written to round, as on the CPU.
    "-fmad=false "
    # Registers and spills of each kernel, for the log.
    "-Xptxas -v "
    f"-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -DUSE_CUDA {TORCH_TARGET}"
)
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


@dataclass(frozen=True)
class Cuda:
    """What .cu files are compiled with, and the GPUs they are compiled for."""

    toolkit: Toolkit
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A library to be: what is compiled, by which tools.

    Attributes:
        name: what the file's name starts with, and the name of the Python module inside.
        what: what it is and for which machines, for the line that is printed.
    """

    name: str
    what: str
    sources: tuple[Path, ...]
    tools: Toolchain
    cuda: Cuda | None = None
    stripped: bool = False
    # One compilation takes half of it, g++'s and nvcc's alike.
    gigabytes_per_job: ClassVar[float] = 1.0

    @property
    def compilers(self) -> str:
        """The compilers' names and what they build for, for people to read."""
        if self.cuda:
            return f"nvcc {self.cuda.toolkit.release}, {self.tools.name}"
        return f"{self.tools.name}, {self.tools.instruction_set}"

    def stem(self) -> str:
        """Return the name and a hash of what decides a build: sources, compilers, flags, torch."""
        import torch

        facts = (*self.tools.compiler, *self.tools.flags, self.tools.macros, self.stripped)
        facts += (torch.__version__, torch.version.cuda, find_pybind11().__version__)
        facts += (sysconfig.get_config_var("EXT_SUFFIX"), platform.libc_ver())
        if self.cuda:
            toolkit = self.cuda.toolkit
            facts += (NVCC_FLAGS, str(_toolkit.nvcc), _toolkit.version, self.cuda.architectures)
            facts += tuple(os.environ.get(name) for name in NVCC_VARIABLES)
        summary = hashlib.sha256(repr(facts).encode())
        for path in (*self.sources, *self.headers()):
            summary.update(f"{path.name} {digest(path)}\n".encode())
        return f"{self.name}-{summary.hexdigest()[:16]}"

    def headers(self) -> list[Path]:
        """Return every file that the sources could include, beside them and in csrc/."""
        roots = {CSRC, *(source.parent for source in self.sources)}
        # The CPU kernels include none of CUDA's files; what lies outside csrc/ may.
        knows_cuda = self.cuda or not all(CSRC in source.parents for source in self.sources)
        ends = ("*.h", "*.cuh", "*.cu") if knows_cuda else ("*.h",)
        return sorted({path for root in roots for end in ends for path in root.rglob(end)})

    def script(self) -> str:
        """Return ninja's rules: one object per source, and one link against torch's libraries."""
        objects = [f"{number}.o" for number, _ in enumerate(self.sources)]
        lines = [
            f"rule cpp\n  command = {_shell(self._cpp())} -c $in -o $out",
            f"rule cu\n  command = {_shell(self._cu())} -c $in -o $out" if self.cuda else "",
            f"rule link\n  command = {_shell(self.tools.compiler)} -shared $in -o $out "
            + _shell(self._link()),
            *(
                f"build {o}: {source.suffix[1:]} {_escape(source)}"
                for o, source in zip(objects, self.sources, strict=True)
            ),
            f"build library.so: link {' '.join(objects)}",
        ]
        return "\n".join(lines) + "\n"

    def _cpp(self) -> list[str]:
        flags = [*self.tools.compiler, *self.tools.flags, f"-I{CSRC}"]
        flags += [f"-isystem{folder}" for folder in self._system()]
        if self.cuda:
            architectures = ";".join(self.cuda.architectures)
            flags += ["-DUSE_CUDA", f'-DFBOPT_CUDA_ARCHITECTURES="{architectures}"']
        return flags + self._prefixes()

    def _cu(self) -> list[str]:
        flags = [str(self.cuda.toolkit.nvcc), *NVCC_FLAGS.split(), "-ccbin", self.tools.bare]
        flags += [*_toolkit.gencode(self.cuda.architectures), f"-I{CSRC}"]
        flags += [word for folder in self._system() for word in ("-isystem", folder)]
        if "-Werror" in self.tools.flags:
            flags += ["-Werror", "all-warnings", "-Xcompiler=-Werror"]
        return flags + [f"-Xcompiler={prefix}" for prefix in self._prefixes()]

    def _link(self) -> list[str]:
        # No search path inside the library: torch is loaded before it, and may be another one by
        # then; it brings libcudart too.
        flags = [f"-L{_torch() / 'lib'}", "-ltorch_cpu"]
        flags += ["-ltorch_cuda", str(self.cuda.toolkit.cudart)] if self.cuda else []
        if sys.platform == "darwin":
            return [*flags, "-undefined", "dynamic_lookup", *(["-Wl,-x"] if self.stripped else [])]
        return [*flags, *(["-s"] if self.stripped else [])]

    def _system(self) -> list[str]:
        # Torch brings a pybind11 of its own, which refuses to go with the stable ABI.
        folders = [find_pybind11().get_include(), str(_torch() / "include"), find_headers()]
        folders += map(str, self.cuda.toolkit.includes) if self.cuda else []
        return folders

    def _prefixes(self) -> list[str]:
        """Error messages name files as csrc/… and torch/…, wherever they were compiled."""
        folders = (CSRC.parent, *self._system())
        return [f"-ffile-prefix-map={folder}/=" for folder in folders]


def _torch() -> Path:
    import torch

    return Path(torch.__file__).parent


def _shell(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
