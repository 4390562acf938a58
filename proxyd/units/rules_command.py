"""Rules: the command line of the proxy, alone and together with the other units."""

from collections.abc import Iterator

from proxyd import address
from proxyd.bind import ListenAddress
from proxyd.errors import UsageError
from proxyd.listen import Listener, match_targets
from proxyd.options import OPTIONS, Options
from proxyd.target import Target
from proxyd.units import compose, facts
from proxyd.units.command import Command
from proxyd.units.rule import Finding, Rule
from proxyd.units.rules_socket import listens_on, only_datagrams
from proxyd.units.sets import Backend, Set


def _where(command: Command) -> tuple[str, int]:
    return command.setting.path, command.setting.line


def _bad_command(rule: Rule, found: Set) -> Iterator[Finding]:
    command = found.command
    if command.error:
        yield rule.found(_where(command), command.error)
    if command.options is None:
        return
    if command.original and found.per_connection:
        yield rule.found(
            _where(command), "systemd's own program takes no connection: it needs Accept=no"
        )
    listeners = _listeners(found, command.options)
    if not found.sockets and not command.options.listen and _has_sockets(found):
        yield rule.found(_where(command), "no socket unit starts it, and it has no --listen=")
    yield from _unmatched(rule, found, command.options, [listener for listener, _ in listeners])
    if facts.network_is_own(found):
        return
    for name, target in command.options.targets:
        for listener, where in listeners:
            if not _may_meet(listener, name, target):
                continue
            if any(_is_same(listener, where, packed) for packed in _addresses(target)):
                yield rule.found(
                    _where(command), f"the target {target.text} is the listener {where.text} itself"
                )


def _may_meet(listener: Listener, name: str | None, target: Target) -> bool:
    """Tell whether what is sent to a target may arrive at a listener: it has one kind."""
    if target.datagram or listener.datagram:
        return listener.datagram and (target.datagram or name in (None, listener.name))
    return True


def _has_sockets(found: Set) -> bool:
    """Tell whether there are sockets at all; a set may be incomplete."""
    return any(name.endswith(".socket") for name in found.library.own_names())


def _listeners(found: Set, options: Options) -> list[tuple[Listener, ListenAddress]]:
    """Return the listeners that the proxy would get, as it would know them."""
    listeners = []
    for socket in found.sockets:
        default = "connection" if socket.flag("Socket", "Accept") else socket.text
        name = socket.value("Socket", "FileDescriptorName", default)
        for where, _ in listens_on(socket):
            listeners.append((_listener(name, where), where))
    listeners += [(_listener(where.name, where), where) for where in options.listen]
    return listeners


def _listener(name: str, where: ListenAddress) -> Listener:
    return Listener(-1, name, where.address, datagram=where.datagram)


def _unmatched(
    rule: Rule, found: Set, options: Options, listeners: list[Listener]
) -> Iterator[Finding]:
    if not listeners:
        return
    try:
        _, unused = match_targets(options.targets, listeners)
    except UsageError as error:
        yield rule.found(_where(found.command), str(error))
        return
    for name in unused:
        message = f"No listener has the name '{name}', its target is not used."
        yield rule.found(_where(found.command), message, "warning")


def _addresses(target: Target) -> list[bytes]:
    """Return the addresses of a target that are known here; of names, only localhost is."""
    if target.address is not None:
        return [target.address]
    if target.host == b"localhost" and target.service:
        return [address.pack_inet(host, target.service) for host in ("127.0.0.1", "::1")]
    return []


def _is_same(listener: Listener, where: ListenAddress, target: bytes) -> bool:
    """Tell whether a connection to `target` reaches the listener."""
    own = listener.address
    if own == target:
        return address.family(own) not in (address.AF_INET, address.AF_INET6) or bool(
            address.port(own)
        )
    inet = (address.AF_INET, address.AF_INET6)
    if address.family(own) not in inet or address.family(target) not in inet:
        return False
    if not address.port(own) or address.port(own) != address.port(target):
        return False
    if not _is_loopback(target):
        return False
    if where.any_family or (own[8:24] == bytes(16) and address.family(own) == address.AF_INET6):
        return True
    return address.family(own) == address.family(target) and own[4:8] == bytes(4)


def _is_loopback(packed: bytes) -> bool:
    if address.family(packed) == address.AF_INET:
        return packed[4] == 127
    return packed[8:24] == bytes(15) + b"\1"


def _idle_never(rule: Rule, found: Set) -> Iterator[Finding]:
    command = found.command
    options = command.options
    if command.original or options is None or found.per_connection or only_datagrams(found):
        return
    if options.exit_idle_time is not None and options.idle_timeout is None:
        yield rule.found(
            _where(command),
            "a client that keeps its connection open, as HTTP clients do, puts the idle exit off "
            "for ever",
        )


def _too_short(rule: Rule, found: Set) -> Iterator[Finding]:
    command = found.command
    options = command.options
    if command.original or options is None or options.connect_timeout is None:
        return
    given = "connect-timeout" in command.given
    for backend in found.backends:
        unit = backend.unit
        if unit is None or (facts.is_helper(found, backend) and not facts.is_heavy(backend)):
            continue
        if facts.tells_readiness(unit):
            longest = unit.span("Service", "TimeoutStartSec", "0")
            text = unit.value("Service", "TimeoutStartSec")
            short = longest is not None and options.connect_timeout < longest
            short = short or (longest is None and not given)
            why = f"a start of {backend.name} may take TimeoutStartSec={text}"
        else:
            short = not given or not options.connect_timeout
            why = f"when {backend.name} listens cannot be known from its Type="
        if short:
            how = "is 10s by default" if not given else "is shorter"
            yield rule.found(_where(command), f"{why}: --connect-timeout= {how}")


def _published(rule: Rule, found: Set) -> Iterator[Finding]:
    command = found.command
    if command.original or command.options is None or not knows_settle_time():
        return
    if only_datagrams(found):
        return
    if "settle-time" in command.given:
        return
    for backend in found.backends:
        port = published_port(found, backend)
        if port:
            yield rule.found(
                _where(command),
                f"port {port} of {backend.name} is published by a container engine, which accepts "
                "connections before the application listens",
            )


def knows_settle_time() -> bool:
    """Tell whether our own program has --settle-time=."""
    return any(option.long == "settle-time" for option in OPTIONS)


def published_port(found: Set, backend: Backend) -> int:
    """Return a port that is published and is a target; 0 if there is none."""
    if backend.unit is None or found.command.options is None:
        return 0
    line = facts.container_command(backend.unit)
    published = _published_ports(line)
    for _, target in found.command.options.targets:
        if not target.service:
            continue
        if target.service in published or (
            _is_on_loopback(target)
            and compose.publishes(backend.unit, line, target.service, found.library.root)
        ):
            return target.service
    return 0


def _is_on_loopback(target: Target) -> bool:
    return any(map(_is_loopback, _addresses(target)))


def _published_ports(line: list[str]) -> set[int]:
    """Return the ports of the host in --publish= and -p of a command line."""
    found = set()
    for at, word in enumerate(line):
        value = ""
        if word in ("-p", "--publish"):
            value = line[at + 1] if at + 1 < len(line) else ""
        elif word.startswith("--publish="):
            value = word.partition("=")[2]
        elif word.startswith("-p") and not word.startswith("--"):
            value = word[2:]
        pieces = value.partition("/")[0].rsplit(":", 2)
        if len(pieces) > 1 and pieces[-2].isascii() and pieces[-2].isdigit():
            found.add(int(pieces[-2]))
    return found


def _trusts_everybody(rule: Rule, found: Set) -> Iterator[Finding]:
    options = found.command.options
    if options is None or options.accept_proxy_protocol is None:
        return
    networks, _ = options.accept_proxy_protocol
    kinds = {4: "IPv4", 16: "IPv6"}
    everybody = [kinds[len(raw)] for raw, bits in networks if bits == 0]
    if everybody:
        who = " and ".join(dict.fromkeys(everybody))
        yield rule.found(
            _where(found.command),
            f"--accept-proxy-protocol= lets every {who} client claim any address",
        )


RULES = (
    Rule(
        "bad-command",
        "error",
        "see systemd-socket-proxyd(1)",
        "The command line is read by the parser of the program itself, and what it refuses is "
        "told in its own words: an option, a time span, a target, a NAME=TARGET without a "
        "listener of that name. A target that is the listener would connect the proxy to "
        "itself.",
        _bad_command,
    ),
    Rule(
        "idle-never",
        "warning",
        "--idle-timeout= as well, longer than the target ever thinks without a byte",
        "--exit-idle-time= counts from the last connection. An HTTP client keeps its connection "
        "open for its next request, so the proxy never gets idle and the backend never stops. "
        "--idle-timeout= closes a connection over which no byte has moved for that long. It "
        "does not know whether the target is thinking: choose it longer than the longest "
        "thought.",
        _idle_never,
    ),
    Rule(
        "timeout-too-short",
        "warning",
        "--connect-timeout= longer than the slowest start of the backend",
        "A client is held for --connect-timeout=, 10s by default, while its target does not "
        "listen. A service with Type=simple or exec is active long before it listens, and after "
        "a crash the whole start of the backend counts. What is longer loses the client.",
        _too_short,
    ),
    Rule(
        "trusts-everybody",
        "warning",
        "--accept-proxy-protocol= with the addresses of the balancer alone",
        "A PROXY header names the client, and is believed: the target, the log and the limit per "
        "source have its address. With a network of prefix length 0, everybody who can connect "
        "may claim any address, such as one that the target trusts.",
        _trusts_everybody,
    ),
    Rule(
        "published-port",
        "warning",
        "--settle-time=500ms",
        "docker-proxy, rootless Podman and pasta accept connections on a published port before "
        "the application in the container listens, and reset them. --settle-time= watches a new "
        "connection for that long before anything is sent, while the target has not been "
        "reached yet.",
        _published,
    ),
)
