"""`create`: a set of units from a listener, a target and a backend."""

import argparse
import os

from proxyd.bind import parse_listen
from proxyd.errors import UsageError, reason
from proxyd.target import parse_target, split_pair
from proxyd.units import names, quadlet, recipes, text, unitfile, words
from proxyd.units.recipes import Request
from proxyd.units.rule import Finding
from proxyd.units.text import Text

_QUADLET = (".container", ".pod", ".kube")
_DIGITS_MAX = 6
_COMPOSE = (".yaml", ".yml")


def read_request(options: argparse.Namespace) -> Request:
    """Read and check the options of `create`. Raises UsageError."""
    request = Request()
    request.user, request.namespace = options.user, options.namespace
    request.accept, request.systemd = options.accept, _version(options.systemd)
    request.idle = _span("--idle=", options.idle) if options.on_demand else ""
    published = _read_backend(request, options.backend or "", bool(options.target))
    request.start = _span("--start-time=", options.start_time or _start(published))
    request.container = published is not None
    request.name = _name(request, options.name or "")
    request.targets = options.target or ([published] if published else [])
    _read_addresses(request, options.listen or [])
    if request.namespace and (not request.backend or request.container):
        raise UsageError("--namespace needs a --backend= that is a service, and no container.")
    _check_accept(request)
    return request


def create(request: Request) -> tuple[list[Text], list[Finding]]:
    """Return the files of the set, and the findings of `check` in them."""
    files = recipes.write_set(request)
    return files, text.try_out(files, {}, request.user)


def next_commands(request: Request) -> list[str]:
    """Return the commands that activate the set."""
    systemctl = "systemctl --user" if request.user else "systemctl"
    sockets = [file.name for file in recipes.write_set(request) if file.name.endswith(".socket")]
    shown = [name.replace("@.", "@INSTANCE.") for name in sockets]
    if request.compose and not request.idle:
        shown.append(request.backend)
    return [f"{systemctl} daemon-reload", f"{systemctl} enable --now {' '.join(shown)}"]


def _read_backend(request: Request, backend: str, has_target: bool) -> str | None:
    """Record the backend; return the target that a container publishes, or "" if unknown.

    None if it is not a container.
    """
    stem, kind = os.path.splitext(os.path.basename(backend))
    if kind in _QUADLET:
        return _read_quadlet(request, backend, has_target)
    if kind in _COMPOSE:
        _check_readable(backend)
        folder = os.path.basename(os.path.dirname(os.path.abspath(backend)))
        base = folder if stem in ("compose", "docker-compose") and folder else stem
        request.compose = os.path.abspath(backend).replace("%", "%%")
        request.backend = f"{names.escape(base)}-compose.service"
        return ""
    unit = names.mangle(os.path.basename(backend))
    if backend and (not names.is_unit(unit) or not unit.endswith(".service")):
        raise UsageError(
            f"--backend={backend}: is no service, .container, .pod, .kube or .yaml file"
        )
    request.backend = unit if backend else ""
    return None


def _check_readable(path: str) -> None:
    """Check that a compose file is text; it may be missing here. Raises UsageError."""
    try:
        data = unitfile.read_bytes(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {reason(error)}") from None
    if b"\0" in data:
        raise UsageError(f"{path}: is not a text file: it contains NUL bytes")


def _read_quadlet(request: Request, path: str, has_target: bool) -> str:
    """Record the service that Quadlet makes of a file; return the one target that it publishes.

    If a target was given, the file may be missing here.
    """
    file = unitfile.read(path)
    faults = [problem for problem in file.problems if problem.fatal]
    if faults and ("/" in path or not has_target or os.path.lexists(path)):
        raise UsageError(f"{path}: {faults[0].message}")
    source = quadlet.source(path)
    if source is None:
        raise UsageError(f"--backend={path}: is not the name of a file of Quadlet's")
    request.backend = source.service
    ports = [setting.value for setting in file.settings if setting.key == "PublishPort"]
    pieces = ports[0].partition("/")[0].rsplit(":", 2) if len(ports) == 1 else []
    return f"127.0.0.1:{pieces[-2]}" if len(pieces) > 1 and pieces[-2].isdigit() else ""


def _start(published: str | None) -> str:
    """Return the default for --start-time=; longer if an image may have to be fetched."""
    return "1min" if published is None else "2min"


def _name(request: Request, name: str) -> str:
    if not name:
        stem = request.backend.removesuffix(".service").partition("@")[0]
        name = f"{stem.removesuffix('-compose')}-proxy" if stem else "proxy"
    template = bool(request.backend) and names.parse(request.backend).is_template
    name = name.removesuffix("@") + ("@" if template else "")
    if "@" in name.removesuffix("@") or not names.is_unit(f"{name}.service"):
        raise UsageError(f"--name={name}: cannot be the name of units")
    return name


def _check_accept(request: Request) -> None:
    """Check that nothing is asked for that cannot be combined with Accept=yes."""
    if not request.accept:
        return
    if request.is_template:
        raise UsageError("--accept makes instances itself: the backend cannot be a template.")
    if request.namespace:
        raise UsageError("--accept cannot be combined with --namespace.")
    if request.datagrams:
        raise UsageError(f"--listen={request.datagrams[0]}: --accept is for connections only.")
    if any(name for name, _ in request.listen):
        raise UsageError("--accept knows no names of listeners: make one set for each.")


def _version(text: str | None) -> int:
    if text is None:
        return recipes.UPHOLDS_SINCE
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS_MAX:
        raise UsageError(f"--systemd={text}: is not a version of systemd")
    return int(text)


def _read_addresses(request: Request, listen: list[str]) -> None:
    if not listen:
        raise UsageError("--listen= is missing.")
    if not request.targets:
        raise UsageError("--target= is missing.")
    for given in listen:
        name, address = split_pair(given)
        try:
            parse_listen(_sample(address))
        except ValueError as error:
            raise UsageError(f"--listen={given}: {error}") from None
        request.listen.append((name or "", address))
    for given in request.targets:
        parse_target(_sample(split_pair(given)[1]))
        if any(char.isspace() or not char.isprintable() for char in given):
            raise UsageError(f"--target={given}: contains white space")
    _match(request)


def _match(request: Request) -> None:
    """Check that a template has %i, and that listeners and targets have the same names."""
    addresses = [address for _, address in request.listen]
    if request.is_template and not all("%i" in a or "%I" in a for a in addresses):
        raise UsageError(
            "--listen= of a template needs %i, or all instances listen on one address."
        )
    named = sorted(name for name, _ in request.listen if name)
    wanted = sorted(name for name, _ in map(split_pair, request.targets) if name)
    if named != wanted and wanted:
        raise UsageError("--listen=NAME=ADDRESS and --target=NAME=TARGET have different names.")
    if len(request.targets) > 1 and len(wanted) < len(request.targets):
        raise UsageError("Several targets need names: --listen=NAME=ADDRESS --target=NAME=TARGET.")


def _sample(address: str) -> str:
    """Return an address with the instance that stands for all, and %t of the system."""
    return address.replace("%i", "1").replace("%I", "1").replace("%t", "/run")


def _span(option: str, value: str) -> str:
    span = words.span(value)
    if isinstance(span, str) or span is None or span == 0:
        raise UsageError(f"{option}{value}: is not a time span")
    return value
