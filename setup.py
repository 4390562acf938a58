"""The one thing pyproject.toml cannot say to every setuptools we support: the extension module."""

import os
from glob import glob

from setuptools import Extension, setup

# CI compiles with PROXYD_WERROR=1. Distributions pass their own CFLAGS, so nothing about
# optimisation or debugging stands here.
WARNINGS = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("PROXYD_WERROR") == "1" else []

setup(
    # Here because the two spellings of pyproject.toml exclude each other: setuptools before 77
    # rejects the SPDX string, and later ones are going to reject the table.
    license="MIT",
    ext_modules=[
        Extension(
            "proxyd._relay",
            sources=["proxyd/_relay.pyx"],
            depends=sorted(glob("proxyd/*.pxd")),
            extra_compile_args=WARNINGS,
        )
    ],
)
