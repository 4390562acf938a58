"""The installed command: arguments, output, exit status, and what is no unit at all."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from units.findings import COMMAND, run

from proxyd.units import check

VERIFY = shutil.which("systemd-analyze")

PROXY = """\
[Unit]
Requires=p.socket
After=p.socket
Wants=b.service
Upholds=b.service
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/bin/systemd-socket-proxyd --connect-timeout=1min 127.0.0.1:81
Restart=on-failure
"""
SET = {
    "p.socket": "[Socket]\nListenStream=80\n",
    "p.service": PROXY,
    "b.service": "[Unit]\nStartLimitIntervalSec=0\n"
    "[Service]\nExecStart=/bin/true\nRestart=always\nRestartSec=1s\n",
}
LINE = (
    "p.service:5: error: Upholds=b.service without After=: clients that come while it stops are "
    "reset [no-order]\n    mend: After= the backend\n"
)


def test_a_finding_is_a_line_with_its_mend(units):
    done = run("check", ".", cwd=units(SET))
    assert done.stdout.replace("Wants=", "Upholds=").replace(":4:", ":5:") == LINE
    assert (done.returncode, done.stderr) == (1, "")


def test_json(units):
    folder = units(SET)
    short = run("check", "--json=short", str(folder))
    pretty = run("check", "--json=pretty", str(folder))
    (finding,) = json.loads(short.stdout)
    assert json.loads(pretty.stdout) == [finding]
    assert short.stdout.count("\n") == 1 < pretty.stdout.count("\n")
    assert finding["path"] == str(folder / "p.service")
    assert set(finding) == {"path", "line", "severity", "rule", "message", "mend"}
    assert run("check", "--json=off", str(folder)).stdout.startswith(f"{folder}/p.service:")


def test_nothing_found_is_an_empty_array(units):
    folder = units(SET | {"p.service": PROXY.replace("[Unit]", "[Unit]\nAfter=b.service")})
    done = run("check", "--json=short", str(folder))
    assert (done.returncode, done.stdout) == (0, "[]\n")


@pytest.mark.parametrize(
    ("threshold", "status"), [("note", 1), ("warning", 1), ("error", 0), (None, 0)]
)
def test_the_threshold(units, threshold, status):
    text = PROXY.replace("[Unit]", "[Unit]\nAfter=b.service").replace("Restart=on-failure\n", "")
    option = [f"--threshold={threshold}"] if threshold else []
    done = run("check", *option, str(units(SET | {"p.service": text})))
    assert "[proxy-cannot-start]" in done.stdout
    assert done.returncode == status


@pytest.mark.parametrize("what", ["p.service", "p.socket", "b.service"])
def test_each_file_of_a_set_stands_for_the_set(units, what):
    assert "[no-order]" in run("check", str(units(SET) / what)).stdout


def test_units_below_a_root(units):
    root = units({f"etc/systemd/system/{name}": text for name, text in SET.items()}, "root")
    for what in ([], ["p.socket"], ["b.service"]):
        done = run("check", f"--root={root}", *what)
        assert f"{root}/etc/systemd/system/p.service:4: error:" in done.stdout
        assert done.returncode == 1


def test_every_rule_is_explained():
    names = [rule.name for rule in check.RULES]
    assert len(set(names)) == len(names)
    listed = run("check", "--explain=list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == names
    for name in names:
        done = run("check", f"--explain={name}")
        assert done.stdout.startswith(f"{name} (")
        assert "\n\nMend: " in done.stdout


def test_every_rule_is_in_the_manual_page():
    page = (Path(__file__).parents[2] / "man/systemd-socket-proxyd-units.1").read_text()
    words = page.replace("\\e", "\\").replace("\\&", "").split()
    text = " ".join(words)
    for rule in check.RULES:
        assert f".It Li {rule.name} Pq {rule.severity}" in text
        for paragraph in (*rule.explain.split("\n"), rule.mend):
            assert " ".join(paragraph.split()) in text, rule.name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["check", "--nothing"],
        ["check", "--json=loud"],
        ["check", "--threshold=7"],
        ["switch"],
    ],
)
def test_what_cannot_be_read_is_status_2(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "systemd-socket-proxyd-units" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--explain=nothing"], "no rule 'nothing'"),
        (["check", "--root=/nowhere"], "/nowhere: no such folder"),
        (["switch", "nowhere.service"], "no such unit"),
        (["switch", "a b"], "is not a unit"),
        (["switch", "nowhere"], "nowhere: no such unit"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# Bad input: a line each.


def test_what_is_no_unit(tmp_path):
    (tmp_path / "text").write_text("words\n")
    done = run("check", "text", "no.service", "/nowhere/x.service", "x/y", cwd=tmp_path)
    assert done.returncode == 1
    for name in ("text", "no.service", "x/y", "/nowhere/x.service"):
        assert f"{name}: error: " in done.stdout


def test_binary_files_loops_and_pipes(units):
    folder = units(
        SET
        | {
            "loop.service": "-> pool.service",
            "pool.service": "-> loop.service",
            "self@.service": "-> self@.service",
            "dangling.socket": "-> nothing.socket",
            "a.service/x": "a folder\n",
        }
    )
    (folder / "binary.service").write_bytes(b"\x7fELF\0\1\2\3" * 100)
    (folder / "latin.service").write_bytes(b"[Unit]\nDescription=\xe4\n[Service]\nExecStart=/x\n")
    os.mkfifo(folder / "pipe.socket")
    done = run("check", str(folder))
    told = {line.partition(": ")[0].rpartition("/")[2] for line in done.stdout.splitlines()}
    wanted = {"loop.service", "pool.service", "self@.service", "dangling.socket", "binary.service"}
    assert told >= {*wanted, "pipe.socket", "latin.service:2"}
    assert "[no-order]" in done.stdout
    assert done.stdout.count("binary.service") == 1  # nothing of what systemd-analyze says of it


def test_names_that_are_not_utf_8(units):
    folder = os.fsencode(units(SET))
    with open(folder + b"/\xff.service", "wb") as file:
        file.write(b"[Service\n")
    os.mkdir(folder + b"/\xfe")
    assert run("check", folder).returncode == 1


@pytest.fixture
def run_as_nobody(tmp_path):
    """Run the command as a user who may not read files of mode 0, here in tmp_path."""
    as_root = os.geteuid() == 0
    if as_root and not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    unprivileged = ["setpriv", "--reuid=65534", "--clear-groups", "--"] if as_root else []
    if subprocess.run([*unprivileged, COMMAND, "--version"], check=False).returncode:
        pytest.skip("nobody may not run the command here")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/") and path.parts[1] == "tmp":
            path.chmod(path.stat().st_mode | 0o055)

    def run_it(*arguments):
        done = subprocess.run(
            [*unprivileged, COMMAND, *arguments], capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr
        return done

    return run_it


def test_what_may_not_be_read(units, run_as_nobody):
    folder = units(SET | {"closed/x.service": "[Service]\n", "b.service.d/x.conf": "[Unit]\n"})
    for name in ("closed", "b.service.d", "p.socket"):
        (folder / name).chmod(0)
    done = run_as_nobody("check", str(folder))
    for name in ("closed", "b.service.d"):
        (folder / name).chmod(0o700)
    for name in ("closed", "b.service.d", "p.socket"):
        assert f"{name}: error: cannot be read: Permission denied" in done.stdout


def test_a_backend_that_may_not_be_read_is_not_judged(units, run_as_nobody):
    """One line says so, and no rule takes the file to be empty."""
    folder = units(SET | {"p.service": PROXY.replace("[Unit]", "[Unit]\nAfter=b.service")})
    (folder / "b.service").chmod(0)
    done = run_as_nobody("check", str(folder))
    line = f"{folder}/b.service: error: cannot be read: Permission denied [unreadable]\n"
    assert (done.returncode, done.stdout) == (1, line)
    switched = run_as_nobody("switch", str(folder / "p.service"))
    assert "b.service cannot be read: it was not looked at" in switched.stderr


def test_switch_of_what_may_not_be_read(units, run_as_nobody):
    folder = units(SET)
    (folder / "b.service").chmod(0)
    done = run_as_nobody("switch", str(folder / "b.service"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("b.service: cannot be read: Permission denied\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "closed/p.service"],
        ["switch", "closed/p.service"],
        ["create", "--listen=80", "--target=81", "--backend=closed/compose.yaml"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_may_not_be_searched(units, run_as_nobody, monkeypatch, arguments):
    folder = units({"closed/p.service": PROXY, "closed/compose.yaml": "services: {}\n"})
    monkeypatch.chdir(folder)
    (folder / "closed").chmod(0)
    done = run_as_nobody(*arguments)
    (folder / "closed").chmod(0o700)
    assert done.returncode == 1
    (line,) = (done.stdout + done.stderr).replace(NO_PROXY, "").splitlines()
    assert "closed" in line
    assert "cannot be read: Permission denied" in line


NO_PROXY = "systemd-socket-proxyd-units: no unit here runs systemd-socket-proxyd\n"


def test_templates_that_want_themselves(units):
    text = PROXY.replace("b.service", "p@%i-%i.service").replace("p.socket", "p@%i.socket")
    folder = units({"p@.service": text, "p@.socket": "[Socket]\nListenStream=/run/%i\n"})
    done = run("check", str(folder))
    assert "[no-order]" in done.stdout
    assert done.returncode == 1


def test_ten_thousand_units(units):
    folder = units(SET)
    for number in range(10_000):
        (folder / f"u{number}.service").write_text("[Service]\nExecStart=/bin/true\n")
    done = run("check", str(folder))
    assert done.stdout.count("[no-order]") == 1
    assert done.returncode == 1


def test_many_proxies(units):
    """Each is compared with what is at its own address, not with all others."""
    folder = units({})
    folder.mkdir()
    for number in range(600):
        text = PROXY.replace("p.socket", f"p{number}.socket").replace("b.s", f"b{number}.s")
        (folder / f"p{number}.service").write_text(text)
        address = f"127.0.{number // 250}.{number % 250 + 1}:80"
        (folder / f"p{number}.socket").write_text(f"[Socket]\nListenStream={address}\n")
        (folder / f"b{number}.service").write_text(SET["b.service"])
    done = run("check", str(folder))
    assert done.stdout.count("[no-order]") == 600
    assert "note: systemd-analyze verify says nothing" in done.stdout or not VERIFY


@pytest.mark.parametrize(
    "text",
    [
        b"[Unit]\n" + b"\\\n" * 100_000,
        b"[Service]\nExecStart=/usr/bin/systemd-socket-proxyd " + b"%i" * 50_000,
        b"[Service]\nExecStart=/usr/bin/systemd-socket-proxyd " + b"a" * 1_100_000,
        b"[Unit]\nStartLimitBurst=" + b"9" * 5000 + b"\n[Service]\nRestartSec=" + b"9" * 5000,
        b"[Unit]\nWants=" + b" ".join(b"x%d.service" % n for n in range(5_000)),
        b"[Unit]\nWants=\0.service\n",
        b"[Service]\nExecStart=/usr/bin/systemd-socket-proxyd \\ud800\\xff\\U00110000 h\\x00:1\n",
        b"[Service]\nExecStart=/usr/bin/systemd-socket-proxyd \xff:1\n",
    ],
    ids=range(8),
)
def test_files_that_go_on_and_on(units, text):
    folder = units(SET)
    (folder / "p.service.d").mkdir()
    (folder / "p.service.d/x.conf").write_bytes(text)
    done = run("check", str(folder))
    assert "[no-order]" in done.stdout
    assert done.returncode == 1


def test_an_interface_that_is_not_here(units):
    folder = units(SET | {"p.socket": "[Socket]\nListenStream=[fe80::1%%nowhere0]:80\n"})
    assert "[no-order]" in run("check", str(folder)).stdout


def test_a_tree_without_end(tmp_path):
    deep = tmp_path
    for _ in range(100):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (tmp_path / "again").symlink_to(tmp_path)
    done = run("check", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    assert "no unit here runs" in done.stderr


def test_a_link_to_a_folder_above_is_not_followed(units):
    folder = units(SET)
    (folder / "up").symlink_to(folder.parent)
    (folder / "root").symlink_to("/")
    (folder.parent / "other").mkdir()
    (folder.parent / "other/x.service").write_text("[Service\n")
    assert run("check", ".", cwd=folder).stdout == run("check", "p.service", cwd=folder).stdout


def test_a_reader_that_leaves(units):
    folder = units(SET)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [COMMAND, "check", folder], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.stderr == b""
