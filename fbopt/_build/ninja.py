"""The recipe of a library, from which follow its cache key and ninja's rules; and its build."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fbopt._build import cache, compiler
from fbopt._build.compiler import TORCH_TARGET, BuildError, Toolchain
from fbopt._build.cuda import Toolkit, gencode

PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package inside it, in a checkout beside it.
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE)
NVCC_FLAGS = (
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", TORCH_TARGET),
    # No fused multiply-add unless written, as on the CPU.
    "-fmad=false",
    # Report each kernel's registers and spills, for the log.
    *("-Xptxas", "-v"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
)
# Strip symbols that are not exported.
LINK_FLAGS = ("-undefined", "dynamic_lookup", "-Wl,-x") if sys.platform == "darwin" else ("-s",)
# What marks errors of the compilers, of the linker, and of nvcc about a host compiler.
ERRORS = ("error:", "undefined reference", "fatal   :", "#error")


@dataclass(frozen=True)
class Recipe:
    """How to build a library: what is compiled, with which tools.

    Attributes:
        name: the first part of the file's name, and the name of the Python module inside.
        what: a description for the line that is printed, with the machines it is for.
    """

    name: str
    what: str
    sources: tuple[Path, ...]
    tools: Toolchain
    toolkit: Toolkit | None = None
    architectures: tuple[str, ...] = ()

    @property
    def compilers(self) -> str:
        """The compilers' versions, for people to read."""
        return (
            f"nvcc {self.toolkit.release}, {self.tools.name}" if self.toolkit else self.tools.name
        )

    def stem(self) -> str:
        """Return the name and a hash of what decides a build: sources, compilers, flags, torch."""
        import torch

        facts = (*self.tools.compiler, *self.tools.flags, self.tools.macros)
        facts += (torch.__version__, torch.version.cuda, compiler.require("pybind11").__version__)
        facts += (sysconfig.get_config_var("EXT_SUFFIX"), platform.libc_ver())
        if self.toolkit:
            facts += (*NVCC_FLAGS, str(self.toolkit.nvcc), self.toolkit.release)
            variables = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
            facts += (self.architectures, *map(os.environ.get, variables))
        summary = hashlib.sha256(repr(facts).encode())
        roots = {CSRC, *(source.parent for source in self.sources)}
        ends = ("*.h", "*.cuh", "*.cu")
        headers = {path for root in roots for end in ends for path in root.rglob(end)}
        for path in (*self.sources, *sorted(headers)):
            summary.update(f"{path.name} {cache.digest(path)}\n".encode())
        return f"{self.name}-{summary.hexdigest()[:16]}"

    def script(self) -> str:
        """Return ninja's rules: one object per source, and one link against torch's libraries."""
        objects = [f"{number}.o" for number, _ in enumerate(self.sources)]
        lines = [f"rule {name}\n  command = {line}" for name, line in self._commands().items()]
        for target, source in zip(objects, self.sources, strict=True):
            path = re.sub("[$ :]", r"$\g<0>", str(source.resolve()))
            lines += [f"build {target}: {source.suffix[1:]} {path}"]
        return "\n".join([*lines, f"build library.so: link {' '.join(objects)}\n"])

    def _commands(self) -> dict[str, str]:
        """Return the command of each rule."""
        import torch

        home = Path(torch.__file__).parent
        # Torch's own copy of pybind11 cannot be used with the stable ABI.
        folders = [compiler.require("pybind11").get_include(), home / "include"]
        folders += [compiler.find_headers(), *(self.toolkit.includes if self.toolkit else ())]
        # Compilers search the system's folder anyway; naming it would hide the C++ library's.
        folders = [folder for folder in map(str, folders) if folder != "/usr/include"]
        includes = [f"-I{CSRC}", *(word for path in folders for word in ("-isystem", path))]
        # Messages name files as csrc/… and torch/…, wherever they were compiled.
        prefixes = [f"-ffile-prefix-map={path}/=" for path in (CSRC.parent, *folders)]
        cpp = [*self.tools.compiler, *self.tools.flags, *includes, *prefixes]
        # No rpath: torch, with CUDA's runtime, is loaded before the library, and may be another
        # version by then.
        link = [*LINK_FLAGS, f"-L{home / 'lib'}", "-ltorch_cpu"]
        commands = {}
        if self.toolkit:
            cu = [str(self.toolkit.nvcc), *NVCC_FLAGS, "-ccbin", self.tools.program, *includes]
            cu += [*gencode(self.architectures), *(f"-Xcompiler={flag}" for flag in prefixes)]
            if "-Werror" in self.tools.flags:
                cu += ["-Werror", "all-warnings", "-Xcompiler=-Werror"]
            commands["cu"] = f"{_shell(cu)} -c $in -o $out"
            cpp += ["-DUSE_CUDA", f'-DFBOPT_CUDA_ARCHITECTURES="{";".join(self.architectures)}"']
            link += ["-Wl,--no-as-needed", "-ltorch_cuda"]
        commands["cpp"] = f"{_shell(cpp)} -c $in -o $out"
        commands["link"] = f"{_shell(self.tools.compiler)} -shared $in -o $out {_shell(link)}"
        return commands


def build(recipe: Recipe) -> Path:
    """Compile a recipe into a shared library, unless it is in the cache, and return its path.

    Raises:
        BuildError: a tool or a writable folder is missing, or a compiler refused the sources.
    """
    if not recipe.sources:
        raise BuildError(f"no C++ sources in {CSRC}", "reinstall fbopt")
    stem = recipe.stem()
    try:
        if library := cache.cached(cache.cache_folder(), stem):
            return library
        folder = cache.writable(cache.cache_folder())
        with cache.lock(folder / f"{stem}.lock", f"compiling {recipe.what}"):
            return cache.cached(folder, stem) or _compile(recipe, folder, stem)
    except OSError as error:
        raise BuildError(f"the cache cannot be used ({error})", "set FBOPT_CACHE_DIR") from error


def _compile(recipe: Recipe, folder: Path, stem: str) -> Path:
    """Build in a scratch folder, then move the library into place."""
    ninja = str(Path(compiler.require("ninja").BIN_DIR, "ninja"))
    script, jobs = recipe.script(), str(compiler.jobs())
    cache.remove_leftovers(folder, stem)
    title = f"fbopt: compiling {recipe.what} ({recipe.compilers}) … "
    print(title, end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{stem}.build-", dir=folder) as scratch:
        Path(scratch, "build.ninja").write_text(script)
        result = compiler.run([ninja, "-C", scratch, "-j", jobs], is_told=True)
        log, failed = folder / f"{stem}.log", result.returncode != 0
        if failed or recipe.toolkit:
            log.write_text(result.stdout + result.stderr)
        if failed:
            print("failed", file=sys.stderr)
            lines = log.read_text().splitlines()
            errors = [line for line in lines if any(mark in line for mark in ERRORS)]
            summary = "\n  ".join(errors[:4] or lines[-4:])
            raise BuildError(f"{recipe.compilers} failed:\n  {summary}\n ", f"read {log}")
        library = cache.keep(Path(scratch, "library.so"), folder, stem)
    seconds, wished = time.perf_counter() - start, cache.cache_folder()
    note = "" if wished.exists() and folder.samefile(wished) else f" ({wished} is not used)"
    print(f"done in {seconds:.1f} s, cached in {folder}{note}", file=sys.stderr)
    return library


def _shell(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")
