"""Load the compiled kernels: a binary wheel's, or else a library built at first use for this
machine, compiler and torch. The CUDA kernels are a separate library.
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

from fbopt._build import cache, cuda, ninja, wheel
from fbopt._build.compiler import BuildError, toolchain
from fbopt._build.ninja import CSRC, Recipe

_loading = threading.Lock()


@functools.cache
def kernels() -> ModuleType | None:
    """Return the module of the CPU kernels, built at first use, or None for plain torch.

    ``FBOPT_BACKEND=reference`` asks for plain torch, ``FBOPT_BACKEND=kernels`` for the kernels or a
    ``BuildError``. Without it a build that fails is one warning. The module's attributes are facts
    about the build: ``compiler``, ``cxx_standard``, ``instruction_set``, ``torch_target``.
    """
    if requested_backend() == "reference":
        return None
    return _load_or_warn("_C", wheel.kernels, cpu_recipe, "plain torch, which is slower")


@functools.cache
def cuda_kernels() -> ModuleType | None:
    """Return the module of the CUDA kernels, built at first use, or None for plain torch.

    ``FBOPT_CUDA=1`` asks for them without a GPU too, ``FBOPT_CUDA=0`` for plain torch. The module's
    attributes are ``cuda_version`` and ``architectures``.
    """
    if requested_backend() == "reference" or not cuda.wanted() or kernels() is None:
        return None
    return _load_or_warn("_cuda", wheel.cuda, cuda_recipe, "plain torch on CUDA tensors")


def backend() -> str:
    """Return the back end in use, ``"kernels"`` or ``"reference"``; build it if it was not yet."""
    return "reference" if kernels() is None else "kernels"


def requested_backend() -> str | None:
    """Return what FBOPT_BACKEND asks for, None if it is not set."""
    asked = os.environ.get("FBOPT_BACKEND") or None
    if asked not in (None, "kernels", "reference"):
        raise ValueError(f"FBOPT_BACKEND is {asked!r}; set it to kernels or reference, or unset it")
    return asked


def find_kernels() -> Path | None:
    """Return the library that ``kernels`` would load, None if it had to compile it first."""
    return wheel.kernels() or _cached(cpu_recipe)


def find_cuda() -> Path | None:
    """Return the library that ``cuda_kernels`` would load, None if it had to compile it first."""
    return wheel.cuda() or _cached(cuda_recipe)


def cpu_recipe(target: str = "native") -> Recipe:
    """Return how the CPU kernels are compiled for one of TARGETS, or for this machine."""
    what = f"the CPU kernels for {'this machine' if target == 'native' else target}"
    sources = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])
    return Recipe("_C", what, tuple(sources), toolchain(target))


def cuda_recipe() -> Recipe:
    """Return how the CUDA kernels are compiled for the GPUs that are visible or asked for."""
    toolkit = cuda.toolkit()
    architectures = cuda.architectures(toolkit)
    what = f"the CUDA kernels for {', '.join(architectures)}"
    sources = sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")])
    # Their C++ files only launch: no instruction set makes them faster.
    return Recipe("_cuda", what, tuple(sources), toolchain("default"), toolkit, architectures)


def recipe(name: str, sources: Sequence[Path], what: str = "a library") -> Recipe:
    """Return how C++ files are compiled for this machine; for the arguments see ``Recipe``."""
    return Recipe(name, f"{what} for this machine", tuple(sources), toolchain())


def build(name: str, sources: Sequence[Path], what: str = "a library") -> Path:
    """Compile C++ files for this machine, unless the cache has the library; return its path."""
    return ninja.build(recipe(name, sources, what))


def load(name: str, sources: Sequence[Path]) -> ModuleType:
    """Build and import a Python module; a library that does not load is built once more."""
    return _load(name, lambda: None, lambda: recipe(name, sources))


def _cached(recipe: Callable[[], Recipe]) -> Path | None:
    with contextlib.suppress(BuildError):
        return cache.cached(cache.cache_folder(), recipe().stem())
    return None


def _load_or_warn(
    name: str, prebuilt: Callable[[], Path | None], recipe: Callable[[], Recipe], instead: str
) -> ModuleType | None:
    try:
        return _load(name, prebuilt, recipe)
    except BuildError as error:
        if requested_backend() == "kernels":
            cause = f"FBOPT_BACKEND asks for the kernels, but: {error.cause}"
            raise BuildError(cause, error.cure) from error
        warnings.warn(f"fbopt falls back to {instead}: {error}", RuntimeWarning, stacklevel=3)
        return None


def _load(
    name: str, prebuilt: Callable[[], Path | None], recipe: Callable[[], Recipe]
) -> ModuleType:
    """Import the wheel's library or the built one, once per process; rebuild what does not load."""
    import torch  # noqa: F401  (the library needs torch's own in the process)

    module = f"{__package__}.{name}"
    with _loading:
        if module in sys.modules:
            return sys.modules[module]
        library = prebuilt()
        for _ in range(3):
            library = library or ninja.build(recipe())
            try:
                return _import(module, library)
            except (ImportError, OSError) as error:
                cause = f"{library} does not load: {error}"
                warnings.warn(f"fbopt: {cause}", RuntimeWarning, stacklevel=4)
            if library.parent != wheel.FOLDER:
                with contextlib.suppress(OSError):
                    library.unlink()
            library = None
    raise BuildError(cause, "report it, with the output of `fbopt doctor`")


def _import(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
