"""Sets that `create` writes: right, checked, and nothing touched that is there."""

import pytest
from units.findings import found_in, rules_in, run

from proxyd.units.rules_command import knows_settle_time

BACKEND = "[Service]\nExecStart=/usr/bin/app\n"
ENABLED = BACKEND + "[Install]\nWantedBy=multi-user.target\n"

BASIC = ["--listen=8080", "--target=127.0.0.1:8081"]
WITH = [*BASIC, "--backend=app.service"]

SETS = {
    "alone": BASIC,
    "alone on demand": [*BASIC, "--on-demand"],
    "remote": ["--listen=127.0.0.1:5432", "--target=db.example.com:5432", "--name=db"],
    "always on": WITH,
    "on demand": [*WITH, "--on-demand"],
    "on demand, spans": [*WITH, "--on-demand", "--idle=1h 30min", "--start-time=5min"],
    "namespace": [*WITH, "--on-demand", "--namespace"],
    "namespace, always on": [*WITH, "--namespace"],
    "unix": ["--listen=/run/a.sock", "--target=/run/app/socket", "--backend=app.service"],
    "abstract": ["--listen=@a", "--target=@b", "--backend=app.service", "--on-demand"],
    "an address of an interface": [
        "--listen=192.0.2.1:80",
        "--listen=[2001:db8::1]:80",
        *BASIC[1:],
    ],
    "several listeners": ["--listen=8080", "--listen=8090", "--target=127.0.0.2:80"],
    "names": ["--listen=a=80", "--listen=b=81", "--target=a=h:80", "--target=b=[::1]:82"],
    "any port": ["--listen=127.0.0.1:80", "--listen=127.0.0.1:443", "--target=10.0.0.1:*"],
    "template": ["--listen=127.0.0.1:%i", "--target=127.0.0.2:%i", "--backend=app@.service"],
    "template on demand": [
        "--listen=/run/%i.sock",
        "--target=/run/app-%i/socket",
        "--backend=app@.service",
        "--on-demand",
        "--namespace",
    ],
    "accept": [*WITH, "--accept"],
    "accept on demand": [*WITH, "--accept", "--on-demand"],
    "accept alone": [*BASIC, "--accept", "--on-demand"],
    "before 249": [*WITH, "--systemd=247"],
    "before 249 on demand": [*WITH, "--systemd=248", "--on-demand"],
    "template before 249": [
        "--listen=127.0.0.1:%i",
        "--target=127.0.0.2:%i",
        "--backend=app@.service",
        "--systemd=247",
        "--on-demand",
    ],
    "datagrams": ["--listen=udp:53", "--target=127.0.0.1:5353", *WITH[2:], "--on-demand"],
    "datagrams of an interface": ["--listen=udp:192.0.2.1:53", "--target=udp:10.0.0.1:53"],
    "both kinds": ["--listen=53", "--listen=udp:53", "--target=127.0.0.1:5353"],
    "both kinds by name": [
        "--listen=web=80",
        "--listen=log=unix-dgram:/run/app-log",
        "--target=web=127.0.0.1:8081",
        "--target=log=/run/app/log",
        "--backend=app.service",
    ],
    "datagrams, template": [
        "--listen=udp:127.0.0.1:%i",
        "--target=127.0.0.2:%i",
        "--backend=app@.service",
    ],
    "datagrams of a user": [
        "--listen=unix-dgram:%t/a",
        "--target=%t/app/socket",
        "--backend=app.service",
        "--user",
    ],
    "user": ["--listen=%t/a", "--target=%t/app/socket", "--backend=app.service", "--user"],
    "user on demand": [*WITH, "--on-demand", "--user"],
}


def create(*arguments, cwd=None):
    return run("create", *arguments, cwd=cwd)


def written(tmp_path, arguments, backend):
    folder = tmp_path / "set"
    done = create(*arguments, f"--output={folder}")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for name in ("app.service", "app@.service"):
        if (folder / f"{name}.d").exists():
            (folder / name).write_text(backend)
    return folder


@pytest.mark.parametrize("name", SETS)
def test_what_is_written_is_sound(tmp_path, name):
    arguments = SETS[name]
    backend = BACKEND if "--on-demand" in arguments else ENABLED
    if "--user" in arguments:
        backend = backend.replace("multi-user", "default")
    folder = written(tmp_path, arguments, backend)
    assert found_in(folder, user="--user" in arguments) == []


@pytest.mark.parametrize("on_demand", [[], ["--on-demand"]])
def test_a_container_of_quadlets(tmp_path, on_demand):
    source = tmp_path / "web.container"
    source.write_text("[Container]\nImage=x\nPublishPort=127.0.0.1:8081:80/tcp\n")
    done = create("--listen=8080", f"--backend={source}", "--output=set", *on_demand, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "set/web.container").write_text(source.read_text())
    if not on_demand:
        with (tmp_path / "set/web.container").open("a") as file:
            file.write("[Install]\nWantedBy=multi-user.target\n")
    assert "127.0.0.1:8081" in (tmp_path / "set/web-proxy.service").read_text()
    assert found_in(tmp_path / "set") == []


@pytest.mark.parametrize("accept", [[], ["--accept"]])
@pytest.mark.parametrize("on_demand", [[], ["--on-demand"]])
def test_a_compose_file(tmp_path, on_demand, accept):
    (tmp_path / "web.yaml").write_text("services: {}\n")
    done = create(*BASIC, "--backend=web.yaml", "--output=set", *on_demand, *accept, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert found_in(tmp_path / "set") == []
    service = (tmp_path / "set/web-compose.service").read_text()
    assert f"--file={tmp_path}/web.yaml up --detach" in service
    if knows_settle_time():
        proxy = tmp_path / f"set/web-proxy{'@' if accept else ''}.service"
        assert "--settle-time=" in proxy.read_text()


@pytest.mark.parametrize("backend", ["app", "/etc/systemd/system/app.service", "./app.service"])
def test_a_backend_by_its_short_name_or_its_path(backend):
    done = create(*BASIC, f"--backend={backend}")
    assert "---app.service.d/50-socket-proxyd.conf---" in done.stdout


def test_files_go_to_stdout_and_what_to_do_to_stderr():
    done = create(*WITH, "--on-demand")
    heads = [line for line in done.stdout.splitlines() if line.startswith("---")]
    assert heads == [
        "---app-proxy.socket---",
        "---app-proxy.service---",
        "---app.service.d/50-socket-proxyd.conf---",
    ]
    assert "systemctl daemon-reload" in done.stderr
    assert "systemctl enable --now app-proxy.socket" in done.stderr


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "app-proxy.service").write_text("mine\n")
    done = create(*WITH, f"--output={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "File exists" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["app-proxy.service"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--listen= is missing"),
        (["--listen=80"], "--target= is missing"),
        (["--listen=80x", "--target=h:1"], "--listen=80x"),
        (["--listen=80", "--target=h:99999"], "99999"),
        (["--listen=80", "--target=a b:1"], "not a host name"),
        ([*BASIC, "--backend=app.timer"], "--backend=app.timer"),
        ([*BASIC, "--backend=/nowhere/x.container"], "No such file"),
        (["--listen=80", "--backend=nowhere.container"], "nowhere.container: cannot be read"),
        ([*BASIC, "--name=a/b"], "--name=a/b"),
        ([*BASIC, "--on-demand", "--idle=soon"], "--idle=soon"),
        ([*WITH, "--start-time=infinity"], "--start-time="),
        ([*BASIC, "--namespace"], "--namespace needs"),
        (["--listen=80", "--target=h:1", "--target=h:2"], "need names"),
        (["--listen=a=80", "--target=b=h:1"], "different names"),
        ([*BASIC, "--backend=app@.service"], "%i"),
        (["--listen=%i", "--target=h:%i", "--backend=a@.service", "--accept"], "--accept makes"),
        ([*WITH, "--accept", "--namespace"], "--accept cannot"),
        (["--listen=a=80", "--target=h:1", "--accept"], "--accept knows no names"),
        (["--listen=udp:53", "--target=h:1", "--accept"], "--accept is for connections only"),
        (["--listen=udp:53", "--target=127.0.0.1:53"], "nothing was written"),
        (["--listen=53", "--target=udp:h:53"], "nothing was written"),
        (["--listen=udp:h:53", "--target=h:53"], "--listen=udp:h:53: 'h' is not an IP address"),
        ([*WITH, "--systemd=old"], "--systemd=old"),
        (["--listen=8080", "--target=127.0.0.1:8080"], "nothing was written"),
        (["--listen=/run/x", "--target=h:*"], "nothing was written"),
    ],
)
def test_what_makes_no_sense_is_told(arguments, message):
    done = create(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


@pytest.mark.parametrize("name", ["web.container", "compose.yaml"])
def test_a_file_that_is_not_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x7fELF\0")
    done = create(*BASIC, f"--backend={name}", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{name}: is not a text file" in done.stderr


def test_upholds_is_left_out_where_systemd_does_not_know_it():
    for version, there in (("248", False), ("249", True), ("257", True)):
        done = create(*WITH, "--on-demand", f"--systemd={version}")
        assert ("Upholds=" in done.stdout) == there
        assert ("Restart=always" in done.stdout) != there


def test_each_connection_gets_a_process(tmp_path):
    folder = written(tmp_path, [*WITH, "--accept", "--on-demand"], BACKEND)
    assert "Accept=yes" in (folder / "app-proxy.socket").read_text()
    service = (folder / "app-proxy@.service").read_text()
    assert "--idle-timeout=15min" in service
    assert "--exit-idle-time" not in service


@pytest.mark.parametrize(
    ("listen", "row"),
    [
        ("udp:53", "ListenDatagram=53"),
        ("udp:127.0.0.1:53", "ListenDatagram=127.0.0.1:53"),
        ("udp:[::1]:53", "ListenDatagram=[::1]:53"),
        ("unix-dgram:/run/a", "ListenDatagram=/run/a"),
        ("unix-dgram:@a", "ListenDatagram=@a"),
        ("53", "ListenStream=53"),
    ],
)
def test_a_listener_of_datagrams(listen, row):
    done = create(f"--listen={listen}", "--target=10.0.0.1:53")
    assert f"\n{row}\n" in done.stdout
    assert "FreeBind" not in done.stdout


def test_a_container_that_gets_datagrams_alone_does_not_have_to_settle(tmp_path):
    (tmp_path / "game.container").write_text(
        "[Container]\nImage=x\nPublishPort=127.0.0.1:1:2/udp\n"
    )
    backend = "--backend=game.container"
    done = create("--listen=udp:53", backend, cwd=tmp_path)
    assert "--settle-time" not in done.stdout
    assert "127.0.0.1:1" in done.stdout
    assert "--settle-time" in create("--listen=53", "--listen=udp:53", backend, cwd=tmp_path).stdout


def test_a_compose_project_of_a_user(tmp_path):
    (tmp_path / "web.yaml").write_text("services: {}\n")
    options = ["--backend=web.yaml", "--output=set", "--user"]
    done = create(*BASIC, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WantedBy=default.target" in (tmp_path / "set/web-compose.service").read_text()
    assert "enable --now web-proxy.socket web-compose.service" in done.stderr


def test_a_namespace_without_its_drop_in_is_not_sound(tmp_path):
    folder = written(tmp_path, [*WITH, "--namespace"], ENABLED)
    (folder / "app.service.d/50-socket-proxyd.conf").unlink()
    assert "private-network-alone" in rules_in(folder)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("web", "%N"),
        ("a-b.c", "%N"),
        (r"my\x2dapp", "my-app"),
        (r"my\x2dapp-a\x20b", "my-app-a_b"),
    ],
)
def test_every_proxy_has_a_folder_of_its_own(name, folder):
    done = create(*BASIC, f"--name={name}")
    assert done.returncode == 0, done.stderr
    assert f"\nRuntimeDirectory={folder}\n" in done.stdout


def test_every_instance_has_a_folder_of_its_own():
    listen = "--listen=127.0.0.1:%i"
    done = create(listen, BASIC[1], "--backend=app@.service", r"--name=my\x2dapp")
    assert "\nRuntimeDirectory=my-app@%i\n" in done.stdout
    done = create(listen, BASIC[1], "--backend=app@.service")
    assert "\nRuntimeDirectory=%N\n" in done.stdout


def test_a_process_for_each_connection_has_no_folder():
    assert "RuntimeDirectory=" not in create(*WITH, "--accept").stdout
