"""What `switch` makes of units: the result is sound, and only what has to change does."""

from pathlib import Path

import pytest
from units.findings import rules_in, run

SOCKET = "[Socket]\nListenStream=80\n\n[Install]\nWantedBy=sockets.target\n"
BACKEND = "[Service]\nExecStart=/usr/bin/app\n"
ORIGINAL = "/usr/lib/systemd/systemd-socket-proxyd"


def proxy(unit="", arguments="127.0.0.1:81", service="", program=ORIGINAL):
    command = f"ExecStart={program} {arguments}\n"
    return f"[Unit]\nDescription=A proxy\n{unit}\n[Service]\n{command}{service}"


def switch(what, *arguments):
    return run("switch", str(what), *arguments)


SETS = {
    "manual page": proxy("Requires=app.service p.socket\nAfter=app.service p.socket\n"),
    "on demand": proxy("Requires=app.service\nAfter=app.service\n", "--exit-idle-time=5min h:81"),
    "bound": proxy("BindsTo=app.service\nAfter=app.service\n", "--exit-idle-time=30s h:81"),
    "wanted": proxy("Wants=app.service\n", "--exit-idle-time=5min h:81"),
    "alone": proxy(),
    "restart": proxy("Wants=app.service\n", "--exit-idle-time=5min h:81", "Restart=always\n"),
    "needed": proxy("StopWhenUnneeded=yes\nWants=app.service\n", "--exit-idle-time=5min h:81"),
}


@pytest.mark.parametrize("name", SETS)
def test_the_result_is_sound(units, name):
    folder = units({"p.socket": SOCKET, "p.service": SETS[name], "app.service": BACKEND})
    assert rules_in(folder)
    output = folder.parent / "output"
    done = switch(folder / "p.service", f"--output={output}")
    assert done.returncode == 0, done.stderr
    for path in output.rglob("*"):
        target = folder / path.relative_to(output)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.write_text(path.read_text())
    left = {"backend-never-stops"} if "exit-idle" not in SETS[name] else set()
    assert rules_in(folder) <= left


def test_a_drop_in_where_it_will_do(units):
    folder = units({"p.socket": SOCKET, "p.service": proxy("Requires=p.socket\n")})
    done = switch(folder / "p.service")
    assert done.stdout.startswith("---p.service.d/50-socket-proxyd.conf---\n# Makes p.service run")
    assert "ExecStart=\nExecStart=/usr/bin/systemd-socket-proxyd 127.0.0.1:81\n" in done.stdout


def test_the_whole_unit_where_a_dependency_has_to_go(units):
    folder = units(
        {
            "p.socket": SOCKET,
            "p.service": proxy("Requires=app.service other.mount\nAfter=app.service\n"),
            "p.service.d/x.conf": "[Service]\nExecStart=\nExecStart=@/usr/lib/systemd/"
            "systemd-socket-proxyd proxy --exit-idle-time=5min 127.0.0.1:82\nUser=www-data\n",
            "app.service": BACKEND,
        }
    )
    done = switch(folder / "p.service")
    assert "---p.service---\n# In place of " in done.stdout
    assert "- Requires=app.service is gone: " in done.stdout
    assert "\nRequires=other.mount\n" in done.stdout
    assert "\nRequires=app" not in done.stdout
    assert "User=www-data\n" in done.stdout
    assert "127.0.0.1:81" not in done.stdout
    assert (
        "ExecStart=@/usr/bin/systemd-socket-proxyd proxy --connect-timeout=1min "
        "--idle-timeout=300s --exit-idle-time=5min 127.0.0.1:82\n" in done.stdout
    )
    assert "x.conf: the new unit has what they say" in done.stderr


def test_a_template_stays_one(units):
    folder = units(
        {
            "p@.socket": SOCKET.replace("80", "/run/%i"),
            "p@.service": proxy("Wants=app@%i.service\n", "--exit-idle-time=5min /run/app-%i"),
            "app@.service": BACKEND,
        }
    )
    done = switch(folder / "p@.service")
    assert "---p@.service.d/50-socket-proxyd.conf---" in done.stdout
    assert "\nUpholds=app@%i.service\n" in done.stdout
    assert "\nRequires=p@%i.socket\n" in done.stdout
    assert "---app@.service.d/50-socket-proxyd.conf---" in done.stdout


def test_nothing_to_change(units):
    sound = Path(__file__).parent / "corpus/sound/folders/web-proxy.service"
    done = switch(sound)
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing to change" in done.stderr


def test_what_runs_no_proxy_is_told(units):
    done = switch(units({"app.service": BACKEND}) / "app.service")
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not run systemd-socket-proxyd" in done.stderr


def test_a_command_that_is_wrong_is_not_switched(units):
    text = proxy(program="/usr/bin/systemd-socket-proxyd", arguments="--nothing h:80")
    done = switch(units({"p.socket": SOCKET, "p.service": text}) / "p.service")
    assert (done.returncode, done.stdout) == (1, "")
    assert "unrecognized option" in done.stderr


def test_a_port_that_is_published_gets_settle_time(units):
    backend = "[Service]\nExecStart=/usr/bin/podman run --publish=127.0.0.1:81:80 x\n"
    text = proxy("Wants=app.service\nAfter=app.service\n")
    folder = units({"p.socket": SOCKET, "p.service": text, "app.service": backend})
    assert "--settle-time=500ms 127.0.0.1:81" in switch(folder / "p.service").stdout


def test_dependencies_and_aliases_by_symlinks_are_seen(units):
    files = {
        "p.socket": SOCKET.replace("80\n", "80\nService=front.service\n"),
        "p.service": proxy("Wants=app.service\nAfter=app.service\n"),
        "front.service": "-> p.service",
        "p.service.upholds/app.service": "-> ../app.service",
        "app.service": BACKEND,
    }
    done = switch(units(files) / "p.service")
    assert (done.returncode, "crash-not-healed" in done.stderr) == (0, False), done.stderr
    assert "Upholds" not in done.stdout


def test_an_error_of_another_unit_is_told_and_does_not_stop_it(units):
    files = {
        "p.socket": f"[Unit]\nAfter=tailscaled.service\n{SOCKET}",
        "p.service": proxy("Wants=app.service\nAfter=app.service\n"),
        "app.service": BACKEND,
    }
    done = switch(units(files) / "p.service")
    assert done.returncode == 0
    assert "[socket-ordered-after-service]" in done.stderr
    assert "Upholds=app.service" in done.stdout


@pytest.mark.parametrize(
    ("service", "added"),
    [("", 1), ("RuntimeDirectory=mine\n", 0)],
)
def test_the_proxy_gets_a_folder_for_its_inspection_socket(units, service, added):
    folder = units({"p.socket": SOCKET, "p.service": proxy("Requires=p.socket\n", service=service)})
    assert switch(folder / "p.service").stdout.count("\nRuntimeDirectory=%N\n") == added
