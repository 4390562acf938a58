"""Which proxies are asked: all that the service manager knows, or those that are named."""

import json

import pytest
from ctl.fake_proxy import exec_start, running

from proxyd.ctl.find import _arguments, _inspect_option


def asked(run, *arguments):
    """The proxies whose connections are listed, in order: (unit, path of its socket below run)."""
    done = run("list", "--user", "--json=short", *arguments)
    rows = json.loads(done.stdout)
    places = [(one["unit"], one["socket"].rpartition("/run/")[2]) for one in rows]
    return list(dict.fromkeys(places)), done


def test_all_running_proxies_are_found(run, proxy, manager):
    for name in ("web", "mail"):
        proxy(name)
    manager(
        {
            "web.service": running(RuntimeDirectory="web other"),
            "ssh.service": running("/usr/sbin/sshd", "-D", RuntimeDirectory="sshd"),
            "mail.service": running(RuntimeDirectory="mail"),
            "rests.service": {"ExecStart": exec_start("/usr/bin/systemd-socket-proxyd", "x:1")},
        }
    )
    found, done = asked(run)
    assert found == [("web.service", "web/inspect"), ("mail.service", "mail/inspect")]
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_with_a_backslash_is_quoted_by_systemctl(run, proxy, manager):
    proxy(r"a@x\x2dy")
    manager({"a.service": running(RuntimeDirectory=r'"a@x\\x2dy" other')})
    assert asked(run)[0] == [("a.service", r"a@x\x2dy/inspect")]


def test_the_option_is_preferred_to_the_runtime_directory(run, proxy, manager, place):
    there = proxy("there")
    program = "/usr/bin/systemd-socket-proxyd"
    manager({"a.service": running(program, f"--inspect={there.path}", "x:1", RuntimeDirectory="b")})
    assert asked(run)[0] == [("a.service", "there/inspect")]


def test_an_inherited_socket_is_that_of_the_unit_with_the_name(run, proxy, manager):
    there = proxy("there")
    manager(
        {
            "a.service": running(
                "/usr/bin/systemd-socket-proxyd",
                "--inspect=fd:look",
                "x:1",
                TriggeredBy="a.socket a-look.socket",
            ),
            "a.socket": {"Listen": "0.0.0.0:80 (Stream)", "FileDescriptorName": "a.socket"},
            "a-look.socket": {"Listen": f"{there.path} (Stream)", "FileDescriptorName": "look"},
        }
    )
    assert asked(run)[0] == [("a.service", "there/inspect")]


def test_a_proxy_that_wants_no_socket_has_none(run, proxy, manager):
    proxy("web")
    program = "/usr/bin/systemd-socket-proxyd"
    manager({"a.service": running(program, "--inspect=no", "x:1", RuntimeDirectory="web")})
    found, done = asked(run)
    assert found == []
    assert "a.service has no inspection socket" in done.stderr


def test_many_units(run, proxy, manager):
    """All are asked in one call, and proxies in several threads."""
    names = [f"web-{number}-{'x' * 100}" for number in range(40)]
    others = {f"other-{number}.service": running("/bin/sleep", "7") for number in range(1000)}
    for name in names[:3]:
        proxy(name[:10])
    units = {f"{name}.service": running(RuntimeDirectory=name[:10]) for name in names}
    manager(others | units)
    found, done = asked(run)
    assert [unit for unit, _ in found] == [f"{name}.service" for name in names[:3]]
    assert done.returncode == 1
    assert done.stderr.count("no answer") == 37


def test_named_units_and_sockets(run, proxy, manager):
    proxy("web")
    other = proxy("other")
    manager({"web.service": running(RuntimeDirectory="web"), "x.service": running()})
    assert asked(run, "--unit=web")[0] == [("web.service", "web/inspect")]
    assert asked(run, f"--socket={other.path}")[0] == [(None, "other/inspect")]
    both = asked(run, f"--socket={other.path}", "--unit=web.service")[0]
    assert both == [(None, "other/inspect"), ("web.service", "web/inspect")]


def test_a_proxy_without_a_socket_is_reported_and_the_others_are_asked(run, proxy, manager):
    proxy("web")
    manager({"bare.service": running(), "web.service": running(RuntimeDirectory="web")})
    found, done = asked(run)
    assert found == [("web.service", "web/inspect")]
    assert done.stderr.startswith("socket-proxyctl: bare.service has no inspection socket")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("rests", "rests.service is not running"),
        ("ssh", "ssh.service does not run systemd-socket-proxyd"),
        ("bare", "bare.service has no inspection socket"),
        ("web.socket", "web.socket is not a service"),
    ],
)
def test_a_named_unit_that_cannot_be_asked_is_one_line(run, manager, unit, message):
    manager({"ssh.service": running("/usr/sbin/sshd"), "bare.service": running()})
    done = run("list", "--user", f"--unit={unit}")
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_service_manager_is_one_line(run, place):
    (place / "bin/systemctl").write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2; exit 1\n")
    done = run("status")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "socket-proxyctl: the service manager cannot be asked: Failed to connect to bus\n"
    )


def test_no_systemctl_is_one_line(run, place):
    (place / "bin/systemctl").unlink()
    done = run("status", PATH=str(place / "bin"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "--socket=" in done.stderr


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["/usr/bin/python3", "-IS", "/usr/bin/systemd-socket-proxyd", "a:1"], ["a:1"]),
        (["python3", "-m", "proxyd", "--threads=2", "a:1"], ["--threads=2", "a:1"]),
        (["/usr/lib/systemd/systemd-socket-proxyd", "a:1"], None),
        (["/usr/sbin/nginx", "-g", "daemon off;"], None),
        ([], None),
    ],
)
def test_which_programs_are_the_proxy(words, arguments):
    assert _arguments(words) == arguments


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--inspect=/a", "x:1"], "/a"),
        (["--inspect", "/a", "x:1"], "/a"),
        (["--ins=/a", "--inspect=/b", "x:1"], "/b"),
        (["--threads=2", "x:1"], ""),
        (["--", "--inspect=/a"], ""),
        (["x:1", "--inspect"], ""),
    ],
)
def test_the_option_in_a_command_line(arguments, value):
    assert _inspect_option(arguments) == value
