"""What a service manager, and systemd-analyze, are asked for; both are played by scripts here."""

import os
import stat

import pytest
from units.findings import found_in

from proxyd.units import check, verify

PROXY = """\
[Unit]
Requires=p.socket
After=p.socket
Wants=b.service
Upholds=b.service
After=b.service

[Service]
ExecStart=/usr/bin/systemd-socket-proxyd --connect-timeout=1min 127.0.0.1:81
Restart=on-failure
RestartSec=1s
"""
UNITS = {
    "p.socket": "[Socket]\nListenStream=80\n",
    "p.service": PROXY,
    "b.service": "[Unit]\nStartLimitIntervalSec=0\n[Service]\nExecStart=/b\nRestart=always\n",
}

SHOW = """\
case "$*" in
*Version*) echo Version=252; exit ;;
esac
cat <<END
Id=p.service
LoadState=loaded
NeedDaemonReload={reload}
Requires={requires}
Wants=b.service
After=b.service p.socket "system-a\\\\x2db.slice" sysinit.target
StartLimitIntervalUSec={interval}
StartLimitBurst=5
Restart=on-failure
RestartUSec=1s
Type=simple

Id=gone.service
LoadState=not-found
END
"""


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Put a script into PATH, under the name of a program."""

    def make(name, script):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

    return make


@pytest.fixture
def machine(units, monkeypatch, play):
    """Let the units be those of this machine; systemd-analyze says nothing."""
    folder = units(UNITS)
    monkeypatch.setenv("SYSTEMD_UNIT_PATH", str(folder))
    play("systemd-analyze", "")
    return folder


def told(**values):
    return SHOW.format(**({"reload": "no", "requires": "p.socket", "interval": "10s"} | values))


def rules(*what):
    return {rule for _, rule, _ in found_in(*what)}


def test_without_a_manager_the_files_tell(machine, play):
    play("systemctl", "exit 1")
    assert rules("p.service") == {"start-limit-kills-socket"}


def test_what_the_manager_says_wins(machine, play):
    play("systemctl", told(interval="0"))  # DefaultStartLimitIntervalSec=0 in system.conf
    assert rules("p.service") == set()


def test_dependencies_from_elsewhere_are_known(machine, play):
    play("systemctl", told(requires="p.socket b.service"))
    assert "failing-start-kills-socket" in rules("p.service")


def test_names_with_a_backslash_are_quoted(units, play):
    unit = check.Scope().library(str(units(UNITS))).get("p.service")
    unit.told["Requires"] = '"a\\\\x2db.service" c.service'
    assert set(unit.dependencies("Requires")) == {"p.socket", "a\\x2db.service", "c.service"}


def test_units_that_have_changed_since_are_told(machine, play):
    play("systemctl", told(reload="yes"))
    assert "daemon-reload" in rules("p.service")


def test_a_manager_that_says_nonsense_is_no_traceback(machine, play):
    play("systemctl", "printf 'Version=1\\nId\\n\\n=x\\n\\377\\n'")
    assert rules("p.service") == {"start-limit-kills-socket"}


def test_units_below_a_root_are_not_asked_for(machine, play, tmp_path):
    play("systemctl", "echo asked >&2; touch $0.asked")
    check.check(["p.service"], check.Scope(root=str(tmp_path)))
    assert not (tmp_path / "bin/systemctl.asked").exists()


# systemd-analyze verify.

SAYS = """\
echo "{folder}/p.service:3: Unknown key name 'Nonsense' in section 'Unit', ignoring." >&2
echo "p.service: Failed to create p.service/start: Unit gone.service not found." >&2
echo "p.service: Command /usr/bin/systemd-socket-proxyd is not executable: No such file" >&2
echo "{folder}/p.service:4: Unknown key name 'RestartMode' in section 'Service', ignoring." >&2
echo "/lib/systemd/system/other.service:1: of others" >&2
echo "words" >&2
exit 1
"""


def test_its_lines_are_passed_on(units, play):
    folder = units(UNITS)
    play("systemd-analyze", SAYS.format(folder=folder))
    found = verify.run(str(folder), [f"{folder}/p.service"], user=False)
    assert [(line.line, line.severity, line.message.split()[0]) for line in found] == [
        (3, "warning", "Unknown"),
        (0, "error", "Failed"),
    ]


def test_of_installed_units_it_may_speak_of_this_machine(units, play):
    folder = units(UNITS)
    play("systemd-analyze", SAYS.format(folder=folder))
    found = verify.run("", [f"{folder}/p.service"], user=False, installed=True)
    assert sum("not executable" in line.message for line in found) == 1


def test_where_it_is_not_there_nothing_is_said(units, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    folder = units(UNITS)
    assert verify.run(str(folder), [f"{folder}/p.service"], user=False) == []
