"""Find or compile the kernels: one shared library per machine, compiler and torch, at first use.

The library's file name carries a hash of all that goes into it and a hash of its own bytes. It is
built under a lock that the system releases when its holder dies, in a folder of its own, and moved
into place as the last act: a build killed at any moment leaves nothing that stops the next one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from fbopt._toolchain import (
    BuildError,
    Toolchain,
    find_headers,
    find_ninja,
    find_pybind11,
    run,
    toolchain,
)

BACKENDS = ("kernels", "reference")
PACKAGE = Path(__file__).resolve().parent
# Inside the package where it is installed, beside it in a checkout.
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE)
_loading = threading.Lock()


@functools.cache
def kernels() -> ModuleType | None:
    """Return the compiled module, built at first use, or None where plain torch takes its place.

    ``FBOPT_BACKEND=reference`` asks for plain torch, ``FBOPT_BACKEND=kernels`` for the kernels or a
    ``BuildError``. Without it, whatever stands in the way of a build is told in one warning.
    """
    choice = requested_backend()
    if choice == "reference":
        return None
    try:
        return load("_C", sources())
    except BuildError as error:
        if choice == "kernels":
            cause = f"FBOPT_BACKEND asks for the kernels, but: {error.cause}"
            raise BuildError(cause, error.cure) from error
        message = f"fbopt falls back to plain torch, which is slower: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None


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


def sources() -> list[Path]:
    """Return the C++ files that the kernels are compiled from."""
    return sorted(CSRC.rglob("*.cpp"))


def load(name: str, sources: Sequence[Path]) -> ModuleType:
    """Build and import a Python module; a library that does not load is built once more."""
    import torch  # noqa: F401  (the library needs torch's own in the process)

    module = f"{__package__}.{name}"
    with _loading:
        if module in sys.modules:
            return sys.modules[module]
        for _ in range(2):
            library = build(name, sources)
            try:
                return _import(module, library)
            except (ImportError, OSError) as error:
                cause = f"the compiled library does not load: {error}"
                with contextlib.suppress(OSError):
                    library.unlink()
        raise BuildError(cause, "report it, with what `fbopt doctor` says")


def build(name: str, sources: Sequence[Path], what: str = "the CPU kernels") -> Path:
    """Compile C++ files into one shared library, unless it is in the cache, and return its path.

    Args:
        name: what the library's file name starts with.
        sources: the files to compile; the headers beside them and in csrc/ count as well.
        what: what is being compiled, for the line that is printed.

    Raises:
        BuildError: a tool or a writable folder is missing, or the compiler refused the sources.
    """
    if not sources:
        raise BuildError(f"no C++ sources in {CSRC}", "install fbopt anew")
    tools = toolchain()
    stem = key(name, tools, sources)
    try:
        if library := cached(cache_folder(), stem):
            return library
        folder = _writable(cache_folder())
        with _lock(folder / f"{stem}.lock", what):
            return cached(folder, stem) or _compile(tools, sources, folder, stem, what)
    except OSError as error:
        raise BuildError(f"the cache cannot be used ({error})", "set FBOPT_CACHE_DIR") from error


def find(name: str, sources: Sequence[Path]) -> Path | None:
    """Return the library that ``build`` would, if the cache has it; compile nothing."""
    return cached(cache_folder(), key(name, toolchain(), sources))


def key(name: str, tools: Toolchain, sources: Sequence[Path]) -> str:
    """Return the name and a hash of what decides a build: sources, compiler, processor, torch."""
    import torch

    facts = (*tools.compiler, *tools.flags, tools.macros, torch.__version__, torch.version.cuda)
    facts += (find_pybind11().__version__, sysconfig.get_config_var("EXT_SUFFIX"))
    digest = hashlib.sha256(repr((facts, platform.libc_ver())).encode())
    headers = {path for root in {CSRC, *(s.parent for s in sources)} for path in root.rglob("*.h")}
    for path in (*sources, *sorted(headers)):
        digest.update(f"{path.name} {_digest(path)}\n".encode())
    return f"{name}-{digest.hexdigest()[:16]}"


def cache_folder() -> Path:
    """Return where libraries are kept: FBOPT_CACHE_DIR, or else fbopt in the user's cache."""
    if folder := os.environ.get("FBOPT_CACHE_DIR"):
        return Path(folder).absolute()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # The tilde of an account without a home stays as it is.
    return Path(home, "fbopt") if os.path.isabs(home) else _temporary_cache()


def cached(folder: Path, stem: str) -> Path | None:
    """Return the library if the folder has it and its bytes are those that were written."""
    for path in folder.glob(f"{stem}.*.so"):
        # Another process may be replacing it just now.
        with contextlib.suppress(OSError):
            if path.name == f"{stem}.{_digest(path)}.so":
                return path
    return None


def tilde(path: Path) -> str:
    """Return the path for people to read, their home folder shortened."""
    home = os.path.expanduser("~")
    return f"~{str(path)[len(home) :]}" if str(path).startswith(home + os.sep) else str(path)


def _compile(tools: Toolchain, sources: Sequence[Path], folder: Path, stem: str, what: str) -> Path:
    """Build in a folder of its own, then move the one file that counts into place."""
    script, ninja = _ninja_script(tools, sources), find_ninja()
    jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
    _remove_leftovers(folder, stem)
    _say(f"compiling {what} for this machine ({tools.name}, {tools.instruction_set}) … ", end="")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{stem}.build-", dir=folder) as scratch:
        Path(scratch, "build.ninja").write_text(script)
        result = run([ninja, "-C", scratch, "-j", jobs])
        if result.returncode != 0:
            print("failed", file=sys.stderr)
            raise _compile_error(tools, result.stdout + result.stderr, folder / f"{stem}.log")
        built = Path(scratch, "library.so")
        library = built.replace(folder / f"{stem}.{_digest(built)}.so")
    note = "" if folder == cache_folder() else f" ({tilde(cache_folder())} is not writable)"
    seconds = time.perf_counter() - start
    print(f"done in {seconds:.1f} s, cached in {tilde(folder)}{note}", file=sys.stderr)
    return library


def _ninja_script(tools: Toolchain, sources: Sequence[Path]) -> str:
    """Write ninja's rules: one object per source, and one link against torch's CPU library."""
    import torch

    root = Path(torch.__file__).parent
    # Torch brings a pybind11 of its own, which refuses to go with the stable ABI.
    system = [find_pybind11().get_include(), str(root / "include"), find_headers()]
    flags = [*tools.flags, f"-I{CSRC}", *(f"-isystem{folder}" for folder in system)]
    # No search path inside the library: torch is loaded before it, and may be another one by then.
    link = [f"-L{root / 'lib'}", "-ltorch_cpu"]
    link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    objects = [f"{number}.o" for number, _ in enumerate(sources)]
    lines = [
        f"rule compile\n  command = {_shell(tools.compiler)} {_shell(flags)} -c $in -o $out",
        f"rule link\n  command = {_shell(tools.compiler)} -shared $in -o $out {_shell(link)}",
        *(f"build {o}: compile {_escape(s)}" for o, s in zip(objects, sources, strict=True)),
        f"build library.so: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def _shell(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compile_error(tools: Toolchain, output: str, log: Path) -> BuildError:
    log.write_text(output)
    lines = output.splitlines()
    errors = [line for line in lines if "error:" in line or "undefined reference" in line]
    summary = "\n  ".join(errors[:4] or lines[-4:])
    return BuildError(f"{tools.name} failed:\n  {summary}\n ", f"read {tilde(log)}")


def _remove_leftovers(folder: Path, stem: str) -> None:
    """Remove what killed builds and broken libraries of this key left; the lock is held."""
    for path in (p for end in ("build-*", "*.so", "log") for p in folder.glob(f"{stem}.{end}")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _import(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


@contextlib.contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    """Hold a lock on the file: unlike a file's mere existence, it ends with its holder.

    The standard library's: filelock falls back to that existence where flock is missing.
    """
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that is compiling {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks: at worst two processes do the same work.
            pass
        yield


def _writable(folder: Path) -> Path:
    """Return the folder, or one of the user's own among the temporary files if it is read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError:
        return _temporary_cache()


def _temporary_cache() -> Path:
    folder = Path(tempfile.gettempdir(), f"fbopt-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    # What another user could have written is not to be loaded.
    if folder.lstat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to another user", "set FBOPT_CACHE_DIR")
    return folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _say(message: str, end: str = "\n") -> None:
    print(f"fbopt: {message}", end=end, file=sys.stderr, flush=True)
