"""Running proxies and their inspection sockets, as the service manager knows them.

Nothing is connected to that could start a proxy: only units with a main process are looked at.
"""

import os
import shlex
import shutil
import subprocess

from proxyd.errors import UsageError

PROGRAM = "systemd-socket-proxyd"

_PATIENCE = 30
_STATES = "active,reloading,activating,deactivating"
_PROPERTIES = "Id,MainPID,ExecStart,RuntimeDirectory,TriggeredBy"


class Proxy:
    """A running proxy, and where it answers."""

    __slots__ = ("path", "unit")

    def __init__(self, unit: str, path: str) -> None:
        self.unit = unit
        """Its service; empty if only the socket is known."""
        self.path = path

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.unit or self.path


class Found:
    """Running proxies, and those that cannot be asked."""

    __slots__ = ("notes", "proxies")

    def __init__(self) -> None:
        self.proxies: list[Proxy] = []
        self.notes: list[str] = []
        """A line for each running proxy that has no inspection socket."""


def find(units: list[str], sockets: list[str], user: bool = False) -> Found:
    """Return the proxies of these units and sockets, or all running ones. Raises UsageError."""
    found = Found()
    found.proxies = [Proxy("", path) for path in sockets]
    if units:
        _find_units(Manager(user), [_service_name(unit) for unit in units], found, named=True)
    elif not sockets:
        manager = Manager(user)
        _find_units(manager, manager.services(), found, named=False)
    return found


def _service_name(unit: str) -> str:
    if unit.endswith(".service"):
        return unit
    if unit.endswith((".socket", ".target", ".timer", ".path")):
        raise UsageError(f"{unit} is not a service")
    return f"{unit}.service"


def _find_units(manager: "Manager", units: list[str], found: Found, named: bool) -> None:
    for properties in manager.show(units, _PROPERTIES):
        unit, pid = properties.get("Id", ""), properties.get("MainPID", "0")
        if pid == "0":
            if named:
                raise UsageError(f"{unit} is not running")
            continue
        arguments = _arguments(_command_line(pid, properties.get("ExecStart", "")))
        if arguments is None:
            if named:
                raise UsageError(f"{unit} does not run {PROGRAM}")
            continue
        path = _socket_path(manager, properties, arguments)
        if path:
            found.proxies.append(Proxy(unit, path))
        elif named:
            raise UsageError(f"{unit} {_WITHOUT_SOCKET}")
        else:
            found.notes.append(f"{unit} {_WITHOUT_SOCKET}")


_WITHOUT_SOCKET = "has no inspection socket; RuntimeDirectory= or --inspect= gives it one"


def _command_line(pid: str, exec_start: str) -> list[str]:
    """Return the words of a process, or of ExecStart= if processes of others are hidden."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read()).rstrip("\0").split("\0")
    except OSError:
        _, _, words = exec_start.partition("argv[]=")
        return words.partition(" ; ignore_errors=")[0].split()


def _arguments(words: list[str]) -> list[str] | None:
    """Return the proxy's arguments; None if this is another program, or systemd's own."""
    for at, word in enumerate(words):
        folder, _, name = word.rpartition("/")
        if name == PROGRAM:
            # systemd's own is no script, and lies in systemd's own folder.
            return None if folder.endswith("/systemd") else words[at + 1 :]
        if word == "-m" and words[at + 1 : at + 2] == ["proxyd"]:
            return words[at + 2 :]
    return None


def _socket_path(manager: "Manager", properties: dict[str, str], arguments: list[str]) -> str:
    """Return the path of the inspection socket; empty if there is none."""
    given = _inspect_option(arguments)
    if given == "no":
        return ""
    if given.startswith("fd:"):
        return _inherited(manager, _words(properties.get("TriggeredBy", "")), given[3:])
    if given:
        return given
    folders = _words(properties.get("RuntimeDirectory", ""))
    return f"{manager.runtime_folder}/{folders[0]}/inspect" if folders else ""


def _inspect_option(arguments: list[str]) -> str:
    """Return the last value of --inspect=, which may be abbreviated; empty if it is not given."""
    value = ""
    for at, word in enumerate(arguments):
        if word == "--":
            break
        name, equals, rest = word.partition("=")
        if len(name) > len("--in") and "--inspect".startswith(name):
            value = rest if equals else "".join(arguments[at + 1 : at + 2])
    return value


def _words(value: str) -> list[str]:
    """Return the elements of a list; those with a backslash are quoted."""
    try:
        return shlex.split(value)
    except ValueError:
        return value.split()


def _inherited(manager: "Manager", units: list[str], name: str) -> str:
    """Return where the socket unit whose FileDescriptorName= is `name` listens."""
    sockets = [unit for unit in units if unit.endswith(".socket")]
    for properties in manager.show(sockets, "Id,Listen,FileDescriptorName"):
        if name in (properties.get("FileDescriptorName"), properties.get("Id")):
            path, _, kind = properties.get("Listen", "").rpartition(" ")
            if kind == "(Stream)" and path.startswith("/"):
                return path
    return ""


class Manager:
    """The service manager of the system, or of the calling user, through systemctl."""

    __slots__ = ("_command", "runtime_folder")

    def __init__(self, user: bool) -> None:
        program = shutil.which("systemctl")
        if program is None:
            raise UsageError("there is no systemctl to find proxies with; use --socket=")
        self._command = [program, "--user"] if user else [program]
        runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
        self.runtime_folder = runtime if user else "/run"
        """Where it makes the folders of RuntimeDirectory=."""

    def services(self) -> list[str]:
        """Return the names of all services that may have a process."""
        text = self._run(
            "list-units",
            "--type=service",
            f"--state={_STATES}",
            "--plain",
            "--no-legend",
            "--no-pager",
            "--full",
        )
        return [line.split()[0] for line in text.splitlines() if line.strip()]

    def show(self, units: list[str], properties: str) -> list[dict[str, str]]:
        """Return {property: value} for each unit."""
        if not units:
            return []
        text = self._run("show", "--no-pager", f"--property={properties}", "--", *units)
        return [
            dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            for block in text.split("\n\n")
            if block.strip()
        ]

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(  # noqa: S603 - a program of systemd
                [*self._command, *arguments],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UsageError("the service manager does not answer; use --socket=") from None
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            why = lines[-1] if lines else f"systemctl ended with status {done.returncode}"
            raise UsageError(f"the service manager cannot be asked: {why}")
        return done.stdout.decode("utf-8", "surrogateescape")
