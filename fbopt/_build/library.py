"""Find a recipe's library in the cache, or compile it: once, whoever asks at the same time."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from fbopt._build import toolkit as _toolkit
from fbopt._build.cache import cache_folder, cached, keep, lock, remove_leftovers, tilde, writable
from fbopt._build.recipe import CSRC, Recipe
from fbopt._build.compiler import BuildError, find_ninja, run

# The compilers' errors, the linker's, and nvcc's about a host compiler that it does not know.
ERRORS = ("error:", "undefined reference", "fatal   :", "#error")


def find(recipe: Recipe) -> Path | None:
    """Return the library that ``build`` would, if the cache has it; compile nothing."""
    return cached(cache_folder(), recipe.stem())


def build(recipe: Recipe) -> Path:
    """Compile a recipe into a shared library, unless it is in the cache, and return its path.

    Raises:
        BuildError: a tool or a writable folder is missing, or a compiler refused the sources.
    """
    if not recipe.sources:
        raise BuildError(f"no C++ sources in {CSRC}", "install fbopt anew")
    stem = recipe.stem()
    try:
        if library := cached(cache_folder(), stem):
            return library
        folder = writable(cache_folder())
        with lock(folder / f"{stem}.lock", recipe.what):
            return cached(folder, stem) or _compile(recipe, folder, stem)
    except OSError as error:
        raise BuildError(f"the cache cannot be used ({error})", "set FBOPT_CACHE_DIR") from error


def _compile(recipe: Recipe, folder: Path, stem: str) -> Path:
    """Build in a folder of its own, then move the one file that counts into place."""
    script, ninja = recipe.script(), find_ninja()
    jobs = str(_toolkit.jobs(recipe.gigabytes_per_job))
    remove_leftovers(folder, stem)
    title = f"fbopt: compiling {recipe.what} ({recipe.compilers}) … "
    print(title, end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{stem}.build-", dir=folder) as scratch:
        Path(scratch, "build.ninja").write_text(script)
        result = run([ninja, "-C", scratch, "-j", jobs])
        log, failed = folder / f"{stem}.log", result.returncode != 0
        if failed or recipe.cuda:
            log.write_text(result.stdout + result.stderr)
        if failed:
            print("failed", file=sys.stderr)
            raise _compile_error(recipe, log)
        library = keep(Path(scratch, "library.so"), folder, stem)
    note = "" if folder == cache_folder() else f" ({tilde(cache_folder())} is not writable)"
    seconds = time.perf_counter() - start
    print(f"done in {seconds:.1f} s, cached in {tilde(folder)}{note}", file=sys.stderr)
    return library


def _compile_error(recipe: Recipe, log: Path) -> BuildError:
    lines = log.read_text().splitlines()
    errors = [line for line in lines if any(sign in line for sign in ERRORS)]
    summary = "\n  ".join(errors[:4] or lines[-4:])
    return BuildError(f"{recipe.compilers} failed:\n  {summary}\n ", f"read {tilde(log)}")
