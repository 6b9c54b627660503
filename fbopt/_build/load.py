"""Find or compile the kernels, and load them: those of a binary wheel, or else one library per
machine, compiler and torch, at first use. The CUDA kernels are a library of their own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from fbopt._build import library as _library, toolkit as _toolkit, wheel as _prebuilt
from fbopt._build.recipe import CSRC, Cuda, Recipe
from fbopt._build.compiler import BuildError, toolchain

BACKENDS = ("kernels", "reference")
_loading = threading.Lock()


@functools.cache
def kernels() -> ModuleType | None:
    """Return the compiled module, built at first use, or None where plain torch takes its place.

    ``FBOPT_BACKEND=reference`` asks for plain torch, ``FBOPT_BACKEND=kernels`` for the kernels or a
    ``BuildError``. Without it, whatever stands in the way of a build is told in one warning.
    """
    if requested_backend() == "reference":
        return None
    return _load_or_warn("_C", cpu_recipe, _prebuilt.kernels, "plain torch, which is slower")


@functools.cache
def cuda_kernels() -> ModuleType | None:
    """Return the compiled module of the CUDA kernels, or None where plain torch takes its place.

    They are built at first use, for the visible GPUs; ``FBOPT_CUDA=1`` asks for them without one,
    ``FBOPT_CUDA=0`` for plain torch. What stands in the way is told as by ``kernels``.
    """
    if requested_backend() == "reference" or not _toolkit.wanted() or kernels() is None:
        return None
    return _load_or_warn("_cuda", cuda_recipe, _prebuilt.cuda, "plain torch on CUDA tensors")


def backend() -> str:
    """Return the back end in use, ``"kernels"`` or ``"reference"``, built if it was not yet."""
    return "reference" if kernels() is None else "kernels"


def requested_backend() -> str | None:
    """Return what FBOPT_BACKEND asks for, None if it is not set."""
    choice = os.environ.get("FBOPT_BACKEND") or None
    if choice not in (None, *BACKENDS):
        allowed = " or ".join(BACKENDS)
        raise ValueError(f"FBOPT_BACKEND is {choice!r}; set it to {allowed}, or unset it")
    return choice


def find_kernels() -> Path | None:
    """Return the library that ``kernels`` would load, None if it had to compile it first."""
    return _find(cpu_recipe, _prebuilt.kernels)


def find_cuda() -> Path | None:
    """Return the library that ``cuda_kernels`` would load, None if it had to compile it first."""
    return _find(cuda_recipe, _prebuilt.cuda)


def sources() -> list[Path]:
    """Return the files that the CPU kernels are compiled from."""
    return sorted(path for path in CSRC.rglob("*.cpp") if CSRC / "cuda" not in path.parents)


def cuda_sources() -> list[Path]:
    """Return the files that the CUDA kernels are compiled from."""
    return sorted(path for end in ("*.cu", "*.cpp") for path in (CSRC / "cuda").rglob(end))


def recipe(
    name: str,
    sources: Sequence[Path],
    what: str = "a library",
    target: str = "native",
    stripped: bool = False,
) -> Recipe:
    """Return how C++ files are compiled for one of ``targets()``, or for this machine.

    Args:
        name: what the library's file name starts with, and the name of the module in it.
        sources: the files to compile; the headers beside them and in csrc/ count as well.
        what: what is being compiled, for the line that is printed.
        target: the instruction set.
        stripped: without the names of what only the library itself uses.
    """
    machine = "this machine" if target == "native" else target
    tools = toolchain(target)
    return Recipe(name, f"{what} for {machine}", tuple(sources), tools, stripped=stripped)


def cpu_recipe(target: str = "native", stripped: bool = False) -> Recipe:
    """Return how the CPU kernels are compiled; for the arguments see ``recipe``."""
    return recipe("_C", sources(), "the CPU kernels", target, stripped)


def cuda_recipe(stripped: bool = False) -> Recipe:
    """Return how the CUDA kernels are compiled for the GPUs that are visible or asked for."""
    toolkit = _toolkit.toolkit()
    cuda = Cuda(toolkit, tuple(_toolkit.architectures(toolkit)))
    what = f"the CUDA kernels for {', '.join(cuda.architectures)}"
    # What their C++ does is to launch: no instruction set makes it faster.
    return Recipe("_cuda", what, tuple(cuda_sources()), toolchain("default"), cuda, stripped)


def build(name: str, sources: Sequence[Path], what: str = "a library") -> Path:
    """Compile C++ files for this machine, unless the cache has the library; return its path."""
    return _library.build(recipe(name, sources, what))


def load(name: str, sources: Sequence[Path]) -> ModuleType:
    """Build and import a Python module; a library that does not load is built once more."""
    return _load(name, lambda: recipe(name, sources))


def _load_or_warn(
    name: str, recipe: Callable[[], Recipe], prebuilt: Callable[[], Path | None], instead: str
) -> ModuleType | None:
    try:
        return _load(name, recipe, prebuilt)
    except BuildError as error:
        if requested_backend() == "kernels":
            cause = f"FBOPT_BACKEND asks for the kernels, but: {error.cause}"
            raise BuildError(cause, error.cure) from error
        message = f"fbopt falls back to {instead}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None


def _find(recipe: Callable[[], Recipe], prebuilt: Callable[[], Path | None]) -> Path | None:
    if library := prebuilt():
        return library
    with contextlib.suppress(BuildError):
        return _library.find(recipe())
    return None


def _load(
    name: str,
    recipe: Callable[[], Recipe],
    prebuilt: Callable[[], Path | None] = lambda: None,
) -> ModuleType:
    """Import what the wheel brings, or else what the recipe gives."""
    import torch  # noqa: F401  (the library needs torch's own in the process)

    module = f"{__package__}.{name}"
    with _loading:
        if module in sys.modules:
            return sys.modules[module]
        if library := prebuilt():
            try:
                return _import(module, library)
            except (ImportError, OSError) as error:
                message = f"{library} does not load, so that fbopt compiles anew: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=4)
        return _load_built(module, recipe())


def _load_built(module: str, recipe: Recipe) -> ModuleType:
    for _ in range(2):
        library = _library.build(recipe)
        try:
            return _import(module, library)
        except (ImportError, OSError) as error:
            cause = f"the compiled library does not load: {error}"
            with contextlib.suppress(OSError):
                _library.unlink()
    raise BuildError(cause, "report it, with what `fbopt doctor` says")


def _import(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
