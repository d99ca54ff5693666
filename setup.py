"""Packaging. `kernels/` at the top level ships inside the package as `meloformer.kernels`.

Another distribution owns the import name `kernels`, so ours must never land in site-packages
under it: see `meloformer/kernels/__init__.py` for how a plain checkout finds the same files.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

VERSION = re.search(
    r'^__version__ = "(.+)"$', Path("meloformer/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)[1]


class BuildWithKernels(build_py):
    """Copies `kernels/*.py` beside `meloformer/kernels/__init__.py` in wheels and sdists."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package == "meloformer.kernels":
            modules += super().find_package_modules(package, "kernels")
        return modules


setup(
    name="meloformer",
    version=VERSION,
    description="Long-song symbolic music generation with structured sparse attention",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["meloformer", "meloformer.*"]),
    entry_points={"console_scripts": ["meloformer = meloformer.__main__:entry_point"]},
    cmdclass={"build_py": BuildWithKernels},
    install_requires=[
        "torch>=2.10",
        "triton>=3.5; platform_system == 'Linux'",
        "numpy>=1.26",
        "miditoolkit>=1.0.1",
        "mido>=1.3",
        "safetensors>=0.5",
        "tqdm>=4.60",
        "matplotlib>=3.8",
        "pyyaml>=6.0",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ninja>=1.11",
            "ruff>=0.8",
        ],
        "sound": ["midirenderer>=0.1.3"],
        "tensorboard": ["tensorboard>=2.14"],
        "wandb": ["wandb>=0.16"],
    },
)
