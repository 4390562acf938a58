"""Completions in real shells: keys are typed into a terminal, and its screen is read."""

import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "blackbox")]

from harness.waiting import set_patience
from terminal import BASH_COMPLETION, INSTALLED, START, Terminal, program, write_settings

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
    "template@.socket": "[Socket]\nListenStream=84\n",
    "orphan.socket.d/name.conf": "[Socket]\nListenStream=85\nFileDescriptorName=orphan\n",
}


def pytest_configure(config):
    set_patience(5.0)
    config.addinivalue_line("markers", "services: needs /etc/services")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("services") and not Path("/etc/services").exists():
            item.add_marker(pytest.mark.skip(reason="no /etc/services here"))


@pytest.fixture(scope="session")
def place():
    """A home, socket units and sockets, in a folder of a short name."""
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


@pytest.fixture(scope="session")
def sockets(place):
    """UNIX sockets to complete: two by their paths, beside a file that is none, and an abstract."""
    folder = place / "run"
    (folder / "folder").mkdir(parents=True)
    (folder / "file.sock").touch()
    (folder / "with space.sock").parent.mkdir(exist_ok=True)
    opened = []
    for address in (str(folder / "app.sock"), str(folder / "folder/in.sock"), "\0sp-abstract"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        opened.append(listener)
    yield folder
    for listener in opened:
        listener.close()


@pytest.fixture(scope="session", params=list(START))
def session(request, place):
    """A terminal with one of the shells."""
    shell = program(request.param)
    for needed in (shell, "tmux", "unshare", "mount", "awk"):
        if not shutil.which(needed):
            pytest.skip(f"no {needed} here")
    if request.param == "bash-completion" and not BASH_COMPLETION.exists():
        pytest.skip("no package bash-completion here")
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
    terminal = Terminal(place, request.param, environment, place / "hosts")
    yield terminal
    terminal.close()


@pytest.fixture
def shell(session):
    """The terminal, with an empty command line."""
    session.clear()
    return session
