"""What pyproject.toml cannot express for every supported version of setuptools.

That is the extension module, and what makes sdist and wheel reproducible to the byte from the same
sources and SOURCE_DATE_EPOCH.
"""

import gzip
import os
import subprocess
import sys
import tarfile
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

# CI compiles with PROXYD_WERROR=1. Optimisation and debugging are left to CFLAGS, which
# distributions set.
WARNINGS = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("PROXYD_WERROR") == "1" else []

# Debugging information names the folder of the build, and the build id is a hash of it.
NO_FOLDER = [f"-ffile-prefix-map={os.getcwd()}=."]

# A wheel records the modes of its files.
os.umask(0o022)


class BuildPy(build_py):
    """Also makes the bundle of the modules that every start needs."""

    def run(self) -> None:  # noqa: D102
        super().run()
        if not getattr(self, "editable_mode", False):  # there, the sources are what is run
            folder = os.path.join(self.build_lib, "proxyd")
            command = [sys.executable, "-I", "make_bundle.py", folder]
            subprocess.run(command, check=True)  # noqa: S603


class Sdist(sdist):
    """An sdist that does not depend on the user, the time or the umask of its build."""

    def make_archive(  # noqa: D102
        self,
        base_name: str,
        kind: str,
        root_dir: str | None = None,
        base_dir: str | None = None,
        **owner: str | None,
    ) -> str:
        if kind != "gztar":  # what build frontends ask for
            return super().make_archive(base_name, kind, root_dir, base_dir, **owner)
        path = f"{base_name}.tar.gz"
        self.mkpath(os.path.dirname(path))
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=source_date()) as stream,
            tarfile.open(fileobj=stream, mode="w") as archive,
        ):
            archive.add(base_dir, filter=anonymous)
        return path


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Reduce what an archive records of a file to its name, executable bit and source date."""
    executable = member.isdir() or member.mode & 0o100
    member.mode = 0o755 if executable else 0o644
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    date = source_date()
    member.mtime = int(member.mtime) if date is None else date
    return member


def source_date() -> int | None:
    """Return SOURCE_DATE_EPOCH (reproducible-builds.org) in seconds; None if it is not set."""
    date = os.environ.get("SOURCE_DATE_EPOCH")
    return int(date) if date else None


setup(
    # Here because the two spellings in pyproject.toml exclude each other: setuptools before 77
    # rejects the SPDX string, and later versions will reject the table.
    license="MIT",
    cmdclass={"build_py": BuildPy, "sdist": Sdist},
    ext_modules=[
        Extension(
            f"proxyd.{name}",
            sources=[f"proxyd/{name}.pyx"],
            depends=sorted(glob("proxyd/relay/*.px[di]")),
            extra_compile_args=[*NO_FOLDER, *WARNINGS],
        )
        for name in ("_relay", "_datagram")
    ],
)
