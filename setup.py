"""What pyproject.toml cannot say to every setuptools we support.

That is the extension module, and how sdist and wheel come out the same to the byte whenever sources
and SOURCE_DATE_EPOCH are the same.
"""

import gzip
import os
import tarfile
from glob import glob

from setuptools import Extension, setup
from setuptools.command.sdist import sdist

# CI compiles with PROXYD_WERROR=1. Distributions pass their own CFLAGS, so nothing about
# optimisation or debugging stands here.
WARNINGS = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("PROXYD_WERROR") == "1" else []

# Debugging information names the folder of the build, and the build id is a hash of it.
NO_FOLDER = [f"-ffile-prefix-map={os.getcwd()}=."]

# A wheel records the modes that its files had when it was made.
os.umask(0o022)


class Sdist(sdist):
    """An sdist without a trace of who made it, when, and with which umask."""

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
    """What an archive may tell of a file: its name, whether it is executable, the source date."""
    executable = member.isdir() or member.mode & 0o100
    member.mode = 0o755 if executable else 0o644
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    date = source_date()
    member.mtime = int(member.mtime) if date is None else date
    return member


def source_date() -> int | None:
    """Seconds since 1970 (reproducible-builds.org), or None: the time that it is."""
    date = os.environ.get("SOURCE_DATE_EPOCH")
    return int(date) if date else None


setup(
    # Here because the two spellings of pyproject.toml exclude each other: setuptools before 77
    # rejects the SPDX string, and later ones are going to reject the table.
    license="MIT",
    cmdclass={"sdist": Sdist},
    ext_modules=[
        Extension(
            "proxyd._relay",
            sources=["proxyd/_relay.pyx"],
            depends=sorted(glob("proxyd/relay/*.pxd")),
            extra_compile_args=[*NO_FOLDER, *WARNINGS],
        )
    ],
)
