"""Where units are: the folders of a machine, and symlinks that stay inside its root."""

import os

_SYSTEM = (
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
    "/run/systemd/generator.late",
)
_USER = (
    "/etc/xdg/systemd/user",
    "/etc/systemd/user",
    "/run/systemd/user",
    "/usr/local/share/systemd/user",
    "/usr/share/systemd/user",
    "/usr/local/lib/systemd/user",
    "/usr/lib/systemd/user",
    "/lib/systemd/user",
)
_QUADLET = (
    "/run/containers/systemd",
    "/etc/containers/systemd",
    "/usr/share/containers/systemd",
)
_QUADLET_USER = ("/etc/containers/systemd/users",)

_VENDOR = ("/usr/", "/lib/")
_LINKS_MAX = 40

_PLACES = ("etc", "usr/lib", "usr/local/lib")
_KINDS = ("system", "user")


class LoopError(Exception):
    """A chain of symlinks that does not end; `str()` says so."""


def search_path(user: bool, rooted: bool) -> list[str]:
    """Return the folders of units by precedence, as systemd.unit(5) lists them.

    `rooted` leaves out what belongs to the user who asks, and SYSTEMD_UNIT_PATH.
    """
    default = [*_own_folders(), *_USER] if user and not rooted else list(_USER if user else _SYSTEM)
    chosen = "" if rooted else os.environ.get("SYSTEMD_UNIT_PATH", "")
    if not chosen:
        return default
    folders = [folder for folder in chosen.split(":") if folder]
    return folders + default if chosen.endswith(":") else folders


def quadlet_path(user: bool, rooted: bool) -> list[str]:
    """Return the folders of Quadlet's files by precedence (podman-systemd.unit(5))."""
    if not user:
        return list(_QUADLET)
    own = [] if rooted else [f"{_config_home()}/containers/systemd"]
    return [*own, *_QUADLET_USER]


def quadlet_beside(folder: str) -> list[str]:
    """Return where Quadlet's files are for a folder of units such as X/systemd/user."""
    top, parent, kind = folder.rsplit("/", 2) if folder.count("/") > 1 else ("", "", "")
    return [f"{top}/containers/systemd"] if parent == "systemd" and kind in _KINDS else []


def is_root(folder: str) -> bool:
    """Tell whether units are below `folder` as they are below the root folder of a machine."""
    return any(
        os.path.isdir(f"{folder}/{place}/systemd/{kind}") for place in _PLACES for kind in _KINDS
    )


def is_vendors(path: str) -> bool:
    """Tell whether a file, by its path inside the root, came with a package."""
    return path.startswith(_VENDOR) and not path.startswith("/usr/local/")


def step(path: str, root: str) -> str | None:
    """Follow one symlink; return where it leads inside `root`, or None if `path` is not one.

    Raises OSError.
    """
    try:
        target = os.readlink(path)
    except OSError as error:
        if error.errno == 22:  # EINVAL: not a symlink
            return None
        raise
    if target.startswith("/"):
        return os.path.normpath(root + target)
    return os.path.normpath(f"{os.path.dirname(path)}/{target}")


def resolve(path: str, root: str) -> list[str]:
    """Follow a chain of symlinks to its end; return every path on the way, `path` first.

    Raises LoopError and OSError.
    """
    way = [path]
    while (target := step(way[-1], root)) is not None:
        if target in way or len(way) > _LINKS_MAX:
            raise LoopError("too many levels of symbolic links")
        way.append(target)
    return way


def _config_home() -> str:
    return os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")


def _own_folders() -> list[str]:
    config = _config_home()
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    run = os.environ.get("XDG_RUNTIME_DIR", "")
    volatile = [f"{run}/systemd/{name}" for name in ("transient", "user", "generator")]
    return [
        f"{config}/systemd/user.control",
        f"{config}/systemd/user",
        *(volatile if run else []),
        f"{data}/systemd/user",
    ]
