"""Wheels with compiled kernels, one library per instruction set, and the sources beside them; with
the sources alone where nothing can be compiled. What an editable install needs is in the checkout.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """Add csrc/, from which an installed copy compiles at first use, and what is compiled."""

    def run(self):
        """Build the package of this very tree, with nothing of an older one."""
        package = Path(self.build_lib, "fbopt")
        if self.editable_mode:
            return super().run()
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        shutil.copytree("csrc", package / "csrc")
        if prebuilt := getattr(self.distribution, "prebuilt", None):
            shutil.copytree(prebuilt, package / "prebuilt")


class BuildWheel(bdist_wheel):
    """Compile before the wheel is packed: what comes of it decides the wheel's tag."""

    def run(self):
        """Build a binary wheel, or else a pure one."""
        with tempfile.TemporaryDirectory() as folder:
            if compile_kernels(Path(folder)):
                self.distribution.prebuilt = folder
                self.distribution.has_ext_modules = lambda: True
                self.root_is_pure = False
            super().run()

    def get_tag(self):
        """Return the tag; a Python for both kinds of Mac compiles for one of them."""
        *python, system = super().get_tag()
        return (*python, system.replace("universal2", platform.machine()))


def compile_kernels(folder):
    """Compile what the wheel brings into the folder; False if the wheel has to do without."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from build_backend import require_compiler
    from fbopt._build.compiler import BuildError

    try:
        require_compiler()
        compile_for_cpu(folder)
    except (BuildError, ImportError) as error:  # also of torch, which is imported only now
        if os.environ.get("FBOPT_BACKEND") == "kernels":
            raise
        say(f"this wheel brings no compiled kernels, they are compiled at first use: {error}")
        return False
    try:
        compile_for_cuda(folder)
    except BuildError as error:
        if os.environ.get("FBOPT_BACKEND") == "kernels" or os.environ.get("FBOPT_CUDA") == "1":
            raise
        say(f"this wheel brings no CUDA kernels, they are compiled at first use: {error}")
    return True


def compile_for_cpu(folder):
    """Compile the CPU kernels once for each instruction set."""
    from fbopt._build import compiler as _toolchain
    from fbopt._build import library as _library
    from fbopt._build import load as _build
    from fbopt._build import wheel as _prebuilt

    for target in _toolchain.targets():
        library = _library.build(_build.cpu_recipe(target, stripped=True))
        shutil.copy(library, folder / _prebuilt.cpu_library(target))


def compile_for_cuda(folder):
    """Compile the CUDA kernels where they are asked for or a GPU is visible."""
    from fbopt._build import library as _library
    from fbopt._build import load as _build
    from fbopt._build import toolkit as _toolkit
    from fbopt._build import wheel as _prebuilt

    if not _toolkit.wanted():
        return
    recipe = _build.cuda_recipe(stripped=True)
    shutil.copy(_library.build(recipe), folder / _prebuilt.CUDA_LIBRARY)
    cuda = recipe.cuda
    facts = {"version": cuda.toolkit.release, "architectures": cuda.architectures}
    (folder / _prebuilt.CUDA_FACTS).write_text(json.dumps(facts))


def say(message):
    """Tell it where pip shows it: with -v, or when the build fails."""
    print(f"fbopt: {message}", file=sys.stderr, flush=True)


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
