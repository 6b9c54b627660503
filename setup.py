"""Put the C++ sources into the package, so that an installed copy can compile them at first use."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSources(build_py):
    """Copy csrc/ into fbopt/csrc; an editable install reads it from the checkout instead."""

    def run(self):
        """Build the package, then add the sources of this very tree and no older ones."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "fbopt", "csrc")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("csrc", target)


setup(cmdclass={"build_py": BuildWithSources})
