"""The recipes: which units make a proxy that heals, as data.

The scenarios of `ci/test e2e` run them under a real systemd, and let every part be killed, fail and
be slow.
"""

from proxyd.units import names
from proxyd.units.rules_command import knows_settle_time
from proxyd.units.text import Section, Text

PROGRAM = "/usr/bin/systemd-socket-proxyd"

DROP_IN = "50-socket-proxyd.conf"
"""The name of drop-ins that we write for other people's units."""

HEALS = [("StartLimitIntervalSec", "0")]
RESTARTS = [("Restart", "on-failure"), ("RestartSec", "1s")]
GOES_ON = [("FileDescriptorStoreMax", "1"), ("ExecReload", "kill -HUP $MAINPID")]
"""For a proxy: neither a restart nor a reload costs a connection."""

ON_DEMAND = [("StopWhenUnneeded", "yes"), ("StartLimitIntervalSec", "0")]
ALWAYS = [("Restart", "always"), ("RestartSec", "1s")]

SETTLES = "--settle-time=500ms"
"""For ports that a container engine publishes."""

UPHOLDS_SINCE = 249
"""The version of systemd that brought Upholds=."""

Rows = list[tuple[str, str]]


class Request:
    """What `create` was asked for."""

    __slots__ = (
        "accept",
        "backend",
        "compose",
        "container",
        "idle",
        "listen",
        "name",
        "namespace",
        "start",
        "systemd",
        "targets",
        "user",
    )

    def __init__(self) -> None:
        self.name = ""
        """The name of the proxy's units, without a type; it ends with @ for a template."""
        self.listen: list[tuple[str, str]] = []
        """NAME (may be empty) and ADDRESS."""
        self.targets: list[str] = []
        self.backend = ""
        """The service that the proxy starts; empty for none."""
        self.container = False
        """Whether Quadlet or compose publishes the target."""
        self.compose = ""
        """The compose file from which to make the backend."""
        self.idle = ""
        """How long after the last client everything stops; empty for never."""
        self.start = ""
        """How long a start of the backend may take."""
        self.namespace = False
        self.accept = False
        """Whether each connection gets a proxy of its own."""
        self.systemd = UPHOLDS_SINCE
        """The oldest version of systemd that must be able to run the units."""
        self.user = False

    @property
    def is_template(self) -> bool:
        """Tell whether one set of units is asked for that serves many instances."""
        return self.name.endswith("@")

    @property
    def datagrams(self) -> list[str]:
        """The listeners that take datagrams."""
        return [one for _, one in self.listen if one.startswith(("udp:", "unix-dgram:"))]

    @property
    def only_datagrams(self) -> bool:
        """Tell whether no listener takes connections."""
        return len(self.datagrams) == len(self.listen)

    def unit(self, kind: str, suffix: str = "") -> str:
        """Return the name of a unit of the proxy's, for a file."""
        stem = self.name.removesuffix("@")
        template = self.is_template or (self.accept and kind == "service")
        return f"{stem}{suffix}{'@' if template else ''}.{kind}"

    @property
    def can_uphold(self) -> bool:
        """Tell whether the proxy can restart its backend; if not, the backend restarts itself."""
        return self.systemd >= UPHOLDS_SINCE

    def meant(self, unit: str) -> str:
        """Return what a dependency on `unit` is called in a unit of the set."""
        parsed = names.parse(unit)
        return names.Name(parsed.prefix, "%i", parsed.type).text if parsed.is_template else unit


def write_set(request: Request) -> list[Text]:
    """Return the units of a set: sockets, the proxy, and what its backend needs."""
    sockets = _sockets(request)
    files = [*sockets, _proxy(request, [socket.name for socket in sockets])]
    if request.compose:
        files.append(_compose(request))
    elif request.backend:
        files.append(_backend(request))
    return files


def for_backend(idle: bool, joined: str = "", upheld: bool = True) -> list[Section]:
    """Return the settings of a backend: to stop with its proxy if `idle`, or to run always.

    `joined` is the proxy whose namespace it shares. A backend that is not `upheld` by its proxy
    restarts itself.
    """
    unit = list(ON_DEMAND if idle else HEALS)
    service: Rows = [] if idle and upheld else list(ALWAYS)
    if joined:
        unit.insert(0, ("JoinsNamespaceOf", joined))
        service.insert(0, ("PrivateNetwork", "yes"))
    return [("Unit", unit), ("Service", service)]


def _sockets(request: Request) -> list[Text]:
    """Return one socket for all listeners, or one for each that has a name."""
    install: Section = ("Install", [("WantedBy", "sockets.target")])
    plain = [address for name, address in request.listen if not name]
    files = []
    if plain:
        rows = list(dict.fromkeys(row for address in plain for row in _listen(request, address)))
        if request.accept:
            rows.append(("Accept", "yes"))
        files.append(Text(request.unit("socket"), [("Socket", rows), install], []))
    for name, address in request.listen:
        if name:
            rows = [
                *_listen(request, address),
                ("FileDescriptorName", name),
                ("Service", request.meant(request.unit("service"))),
            ]
            unit = request.unit("socket", f"-{names.escape(name)}")
            files.append(Text(unit, [("Socket", rows), install], []))
    return files


def _listen(request: Request, given: str) -> Rows:
    kind, _, rest = given.partition(":")
    datagram = kind in ("udp", "unix-dgram")
    address = rest if datagram else given
    rows = [("ListenDatagram" if datagram else "ListenStream", address)]
    return rows if request.user or not _needs_interface(address) else [*rows, ("FreeBind", "yes")]


def _needs_interface(address: str) -> bool:
    """Tell whether an address may still be missing at boot."""
    if address.startswith(("/", "@", "%", "vsock:", "unix:")) or address.isdigit():
        return False
    return not address.startswith(("127.", "0.0.0.0:", "[::1]:", "[::]:"))


def _proxy(request: Request, sockets: list[str]) -> Text:
    own = " ".join(request.meant(socket) for socket in sockets)
    unit: Rows = [] if request.accept else [("Requires", own), ("After", own)]
    service: Rows = [("Type", "notify")]
    if request.backend:
        unit += _dependencies(request)
    if len(sockets) > 1:
        service.append(("Sockets", own))
    service.append(("ExecStart", command(request)))
    if request.accept:  # nothing counts its starts, and no client waits for its next one
        unit.append(("CollectMode", "inactive-or-failed"))
    else:
        unit += HEALS
        service += [*RESTARTS, *([] if request.only_datagrams else GOES_ON)]
        service.append(("RuntimeDirectory", runtime_directory(request.unit("service"))))
    if request.namespace:
        service.append(("PrivateNetwork", "yes"))
    return Text(request.unit("service"), [("Unit", unit), ("Service", service)], [])


def _dependencies(request: Request) -> Rows:
    backend = request.meant(request.backend)
    upholds = [("Upholds", backend)] if request.can_uphold else []
    joins = [("JoinsNamespaceOf", backend)] if request.namespace else []
    return [("Wants", backend), *upholds, ("After", backend), *joins]


def command(request: Request) -> str:
    """Return the command line of the proxy."""
    options = []
    if request.backend:
        options.append(f"--connect-timeout={_quoted(request.start)}")
    if request.container and knows_settle_time() and not request.only_datagrams:
        options.append(SETTLES)
    if request.idle:
        idle = _quoted(request.idle)
        options += [] if request.accept else [f"--exit-idle-time={idle}"]
        options.append(f"--idle-timeout={idle}")
    return " ".join([PROGRAM, *options, *map(_quoted, request.targets)])


def _quoted(word: str) -> str:
    """Quote a word of a command line: %i is expanded, variables are not."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"' if any(char in escaped for char in " \t;'\"*") else escaped


def runtime_directory(unit: str) -> str:
    """Return the folder for the inspection socket of a proxy, which no other unit has.

    systemd 257 cannot start a service whose folder has a backslash in its name.
    """
    name = names.parse(unit)
    if "\\" not in name.prefix:
        return "%N"
    plain = names.unescape(name.prefix).replace("/", "-")
    safe = "".join(char if char.isalnum() or char in "-_." else "_" for char in plain)
    return safe if name.instance is None else f"{safe}@%i"


def _backend(request: Request) -> Text:
    joined = request.meant(request.unit("service")) if request.namespace else ""
    name = f"{request.backend}.d/{DROP_IN}"
    return Text(name, for_backend(bool(request.idle), joined, request.can_uphold), [])


def _compose(request: Request) -> Text:
    run = f"/usr/bin/docker compose --file={_quoted(request.compose)}"
    service = [
        ("Type", "oneshot"),
        ("RemainAfterExit", "yes"),
        ("ExecStart", f"{run} up --detach"),
        ("ExecStop", f"{run} stop"),
    ]
    if not request.can_uphold:
        service += RESTARTS  # a oneshot cannot have Restart=always
    unit = [("Wants", "docker.service"), ("After", "docker.service")]
    unit += ON_DEMAND if request.idle else HEALS
    sections: list[Section] = [("Unit", unit), ("Service", service)]
    if not request.idle:
        target = "default.target" if request.user else "multi-user.target"
        sections.append(("Install", [("WantedBy", target)]))
    comment = (
        'systemd does not see when a container dies: the project needs "restart: unless-stopped".'
    )
    return Text(request.backend, sections, [comment])
