"""Completions in real shells: keys are sent to a terminal, and its screen is read."""

import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from kit.terminal import BASH_COMPLETION, INSTALLED, Terminal, program, write_settings

HOSTS = """
127.0.0.1 localhost
192.0.2.7 alpha.example alpha # not beta.example
2001:db8::7 six.example
ff02::1 ip6-allnodes
0.0.0.0 blocked.example
"""

KNOWN_HOSTS = """\
gamma.example,192.0.2.8 ssh-ed25519 AAAA
[delta.example]:2222 ssh-ed25519 AAAA
2001:db8::8 ssh-ed25519 AAAA
|1|aGFzaGVk|aGFzaGVk ssh-ed25519 AAAA
@cert-authority *.epsilon.example ssh-ed25519 AAAA
zeta*.example ssh-ed25519 AAAA
# eta.example
"""

UNITS = {
    "plain.socket": "[Socket]\nListenStream=80\n",
    "named.socket": "[Socket]\nListenStream=81\nFileDescriptorName=http\n",
    "mended.socket": "[Socket]\nListenStream=82\nFileDescriptorName=before\n",
    "mended.socket.d/name.conf": "[Socket]\nFileDescriptorName=after\n",
    "datagram.socket": "[Socket]\nListenDatagram=83\n",
    "packet.socket": "[Socket]\nListenSequentialPacket=/run/packet\n",
    "template@.socket": "[Socket]\nListenStream=84\n",
    "orphan.socket.d/name.conf": "[Socket]\nListenStream=85\nFileDescriptorName=orphan\n",
}


def pytest_configure(config):
    config.addinivalue_line("markers", "services: needs /etc/services")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("services") and not Path("/etc/services").exists():
            item.add_marker(pytest.mark.skip(reason="no /etc/services here"))


@pytest.fixture(scope="session")
def place():
    """A home folder, socket units and sockets, in a folder with a short name."""
    with tempfile.TemporaryDirectory(prefix="sp-") as name:
        place = Path(name)
        home = place / "home"
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh/known_hosts").write_text(KNOWN_HOSTS)
        write_settings(home)
        (place / "hosts").write_text(HOSTS)
        for unit, text in UNITS.items():
            path = place / "units" / unit
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        yield place


FILES = ("app.sock", "folder/in.sock", "with space.sock")


@pytest.fixture(scope="session")
def sockets(place):
    """A folder with UNIX sockets and another file; there are abstract sockets, too, of both kinds.

    Abstract names are the whole machine's, and other runs may be under way: it begins with `place`.
    """
    folder = place / "run"
    (folder / "folder").mkdir(parents=True)
    (folder / "file.sock").touch()
    opened = []
    for address in (*map(str, (folder / name for name in FILES)), f"\0{place.name}-abstract"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        opened.append(listener)
    opened.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    opened[-1].bind(f"\0{place.name}-datagrams")
    yield folder
    for listener in opened:
        listener.close()


def open_terminal(place, kind):
    """Start a terminal with a shell of this kind."""
    shell = program(kind)
    for needed in (shell, "tmux", "unshare", "mount", "awk"):
        if not shutil.which(needed):
            pytest.skip(f"no {needed} here")
    if not INSTALLED[shell].exists():
        pytest.fail(f"{INSTALLED[shell]} was not installed")
    environment = {
        "HOME": place / "home",
        "LANG": "C.UTF-8",
        "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/bin:/bin",
        "SYSTEMD_UNIT_PATH": place / "units",
        "TERM": "screen",
        "XDG_DATA_DIRS": f"{Path(sys.prefix) / 'share'}:/usr/local/share:/usr/share",
    }
    return Terminal(place, kind, environment, place / "hosts")


@pytest.fixture(scope="session", params=["bash", "zsh", "fish"])
def session(request, place):
    """A terminal with one of the shells."""
    terminal = open_terminal(place, request.param)
    yield terminal
    terminal.close()


@pytest.fixture
def shell(session):
    """The terminal, with an empty command line."""
    session.clear()
    return session


@pytest.fixture
def bash_with_package(place):
    """A bash with the package bash-completion, which loads completions on demand."""
    if not BASH_COMPLETION.exists():
        pytest.skip("no package bash-completion here")
    terminal = open_terminal(place, "bash-completion")
    yield terminal
    terminal.close()
