"""Completion of the command line in each shell."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from kit.terminal import bracketed, is_listed

COMMAND = Path(sys.prefix) / "bin/systemd-socket-proxyd"
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


def options_of_help():
    """The options in the --help of the installed command."""
    text = subprocess.run([COMMAND, "--help"], check=True, capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if re.match(r" +-", line)]
    heads = [line[:28] if line[28:29] == " " else line for line in lines]  # a long one is alone
    return set(OPTION.findall(" ".join(heads)))


def test_the_options_are_those_of_help(shell):
    wanted = options_of_help()
    assert len(wanted) > 8, wanted
    offered = set(OPTION.findall(shell.offers("-", wanted)))
    assert offered == wanted


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--proxy-protocol=v1", "--proxy-protocol=v1 "),
        ("--exit-idle-time=5", "--exit-idle-time=5min "),
        ("--connect-timeout 30", "--connect-timeout 30s "),
        ("--idle-timeout=inf", "--idle-timeout=infinity "),
        ("--settle-time=100", "--settle-time=100ms "),
        ("--drain-timeout 1h", "--drain-timeout 1h "),
        ("--threads=a", "--threads=auto "),
        ("--hand-over b", "--hand-over busy "),
        ("--buffer-size=a", "--buffer-size=auto "),
        ("--buffer-size 256", "--buffer-size 256K "),
        ("-c 40", "-c 4096 "),
        ("--connections-max=25", "--connections-max=256 "),
    ],
)
def test_values_of_options(shell, typed, line):
    shell.completed(typed, "+", line + "+")


def test_every_span_is_offered(shell):
    listed = shell.offers("--connect-timeout ", {"0", "10s", "30s", "1min", "5min", "infinity"})
    assert not is_listed("localhost:", listed)


def test_an_idle_timeout_of_0_is_not_offered(shell):
    assert not is_listed("0", shell.offers("--idle-timeout ", {"10s", "infinity"}))


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("alpha.", "alpha.example:"),
        ("192.0.2.7", "192.0.2.7:"),
        ("gam", "gamma.example:"),
        ("192.0.2.8", "192.0.2.8:"),
        ("del", "delta.example:"),
        ("127", "127.0.0.1:"),
        ("http=gam", "http=gamma.example:"),
        ("-- gam", "-- gamma.example:"),
    ],
)
def test_hosts_are_completed(shell, typed, line):
    shell.completed(typed, "+", line + "+")


@pytest.mark.parametrize(
    ("typed", "host"),
    [("[::", "[::1]:"), ("[2001:db8::7", "[2001:db8::7]:"), ("[2001:db8::8", "[2001:db8::8]:")],
)
@pytest.mark.parametrize("name", ["", "http="])
def test_ipv6_in_brackets(shell, name, typed, host):
    typed, host = bracketed(typed, shell.kind), bracketed(host, shell.kind)
    shell.completed(name + typed, "80", f"{name}{host}80")


def test_only_hosts_are_offered(shell):
    kinds = {"/", "unix:", "vsock:", "udp:", "unix-dgram:"}
    listed = shell.offers("", {"alpha:", "localhost:", "six.example:"} | kinds)
    for part in ("beta", "ip6-allnodes", "blocked", "0.0.0.0", "|1|", "epsilon", "zeta", "eta"):
        assert not re.search(rf"(^|\s){re.escape(part)}", listed, re.MULTILINE), part


@pytest.mark.services
@pytest.mark.parametrize("host", ["localhost:", "::1:", "imap=localhost:"])
def test_ports_of_a_host(shell, host):
    shell.offers(host + "imap", {"imap2", "imaps"})


@pytest.mark.services
def test_ports_of_an_ipv6_address(shell):
    host = bracketed("[::1]:", shell.kind)
    shell.completed(f"{host}gop", "+", f"{host}gopher +")


def test_the_port_that_the_client_connected_to(shell):
    assert is_listed("*", shell.offers("localhost:", {"*"}))


@pytest.mark.parametrize(
    "before",
    ["", "unix:", "http=", "http=unix:", "--listen=", "--listen ", "unix-dgram:", "a=unix-dgram:"],
)
def test_paths_of_sockets(shell, sockets, before):
    shell.completed(f"{before}{sockets}/a", "+", f"{before}{sockets}/app.sock +")
    shell.clear()
    shell.completed(f"{before}{sockets}/fo", "in", f"{before}{sockets}/folder/in")


def test_a_file_that_is_not_a_socket_is_not_offered(shell, sockets):
    listed = shell.offers(f"{sockets}/", {"app.sock", "folder/"})
    assert "file.sock" not in listed


def test_a_path_is_quoted(shell, sockets):
    shell.completed(f"{sockets}/w", "+", f"{sockets}/with\\ space.sock +")


@pytest.mark.parametrize("before", ["", "unix:", "http=", "--listen=", "--listen=web="])
def test_abstract_sockets(shell, place, sockets, before):
    shell.completed(f"{before}@{place.name}-ab", "+", f"{before}@{place.name}-abstract +")


def test_vsock(shell):
    shell.completed("vs", "2", "vsock:2")
    shell.clear()
    shell.completed("vsock:2", "80", "vsock:2:80")


@pytest.mark.parametrize("before", ["", "dns=", "--listen=", "--listen=dns=", "--listen "])
def test_datagrams(shell, before):
    shell.completed(f"{before}ud", "127", f"{before}udp:127")
    shell.clear()
    shell.completed(f"{before}udp:127", "+", f"{before}udp:127.0.0.1:+")


@pytest.mark.services
def test_ports_of_udp(shell):
    host = bracketed("[::1]:", shell.kind)
    shell.completed(f"udp:{host}tft", "+", f"udp:{host}tftp +")


def test_abstract_sockets_for_datagrams(shell, place, sockets):
    before = f"unix-dgram:@{place.name}"
    shell.completed(f"{before}-da", "+", f"{before}-datagrams +")


def test_names_of_listeners(shell):
    listed = shell.offers("", {"plain.socket=", "http=", "after=", "datagram.socket="})
    for name in ("named.socket", "mended.socket", "before", "packet", "template", "orphan"):
        assert not re.search(rf"(^|\s){name}", listed, re.MULTILINE), name


def test_a_name_is_followed_by_its_target(shell):
    shell.completed("pla", "gamma", "plain.socket=gamma")


def test_the_names_of_listen_are_names_of_listeners(shell):
    shell.completed("--listen=web=8080 we", "+", "--listen=web=8080 web=+")
    shell.clear()
    shell.completed("--listen web=8080 we", "+", "--listen web=8080 web=+")


def test_a_listener_has_one_target(shell):
    listed = shell.offers("http=localhost:80 ", {"plain.socket=", "after="})
    assert not is_listed("http=", listed)
    assert not is_listed("localhost:", listed)


@pytest.mark.parametrize("before", ["localhost:80", "-- -c", "--conn 5 localhost:80"])
def test_a_plain_target_is_the_only_one(shell, before):
    shell.completed(f"{before} pla", "+", f"{before} pla+")


def test_no_options_after_the_end_of_options(shell):
    shell.completed("-- --vers", "+", "-- --vers+")


def test_addresses_to_listen_on(shell):
    listed = shell.offers("--listen ", {"127.0.0.1:", "0.0.0.0:", "/", "vsock:", "udp:"})
    assert not is_listed("gamma.example:", listed)


def test_the_package_bash_completion_loads_it(bash_with_package):
    bash_with_package.offers("-", options_of_help())
    bash_with_package.clear()
    bash_with_package.completed("http=[2001:db8::8", "80", "http=[2001:db8::8]:80")
