"""Build wheels with compiled kernels, one library per instruction set, and the sources beside them;
with the sources alone where nothing can be compiled. An editable install uses the checkout.
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
    """Add csrc/, from which an installed copy compiles at first use, and the compiled kernels."""

    def run(self):
        """Copy the package, with nothing left of an older build."""
        package = Path(self.build_lib, "fbopt")
        if self.editable_mode:
            return super().run()
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        shutil.copytree("csrc", package / "csrc")
        if prebuilt := getattr(self.distribution, "prebuilt", None):
            shutil.copytree(prebuilt, package / "prebuilt")


class BuildWheel(bdist_wheel):
    """Compile before the wheel is packed, as its tag depends on the result."""

    def run(self):
        """Build a binary wheel, or else a wheel of sources."""
        with tempfile.TemporaryDirectory() as folder:
            if compile_kernels(Path(folder)):
                self.distribution.prebuilt = folder
                self.distribution.has_ext_modules = lambda: True
                self.root_is_pure = False
            super().run()

    def get_tag(self):
        """Return the tag; on macOS that of the one architecture compiled for."""
        *python, system = super().get_tag()
        return (*python, system.replace("universal2", platform.machine()))


def compile_kernels(folder):
    """Compile the wheel's kernels into the folder; return False if none can be compiled."""
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
    from fbopt._build import compiler, load, ninja, wheel

    for target in compiler.TARGETS:
        library = ninja.build(load.cpu_recipe(target))
        shutil.copy(library, folder / wheel.CPU_LIBRARY.format(target))


def compile_for_cuda(folder):
    """Compile the CUDA kernels where they are asked for or a GPU is visible."""
    from fbopt._build import cuda, load, ninja, wheel

    if not cuda.wanted():
        return
    recipe = load.cuda_recipe()
    shutil.copy(ninja.build(recipe), folder / wheel.CUDA_LIBRARY)
    facts = {"version": recipe.toolkit.release, "architectures": recipe.architectures}
    (folder / wheel.CUDA_FACTS).write_text(json.dumps(facts))


def say(message):
    """Print a message, which pip shows with -v or when the build fails."""
    print(f"fbopt: {message}", file=sys.stderr, flush=True)


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
