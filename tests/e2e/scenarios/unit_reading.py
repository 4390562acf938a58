"""What our reader makes of unit files is what the service manager makes of them."""

import json

from e2e.harness import scenario
from e2e.machine import Machine, same

READ = """
import json, sys
from proxyd.units import check

library = check.Scope().library()
found = {}
for name in sys.argv[1:]:
    unit = library.get(name)
    found[name] = unit and {
        "Id": unit.text,
        "Names": sorted(unit.aliases),
        "FragmentPath": unit.shown,
        "DropInPaths": [file.path for file in unit.files[1:]],
        "Wants": sorted(unit.dependencies("Wants")),
        "Requires": sorted(unit.dependencies("Requires")),
        "Upholds": sorted(unit.dependencies("Upholds")),
        "Environment": [unit.expand(s.value) for s in unit.entries("Service", "Environment")],
        "Restart": unit.choice("Service", "Restart", "no"),
        "RestartUSec": unit.span("Service", "RestartSec", "100ms"),
        "StopWhenUnneeded": unit.flag("Unit", "StopWhenUnneeded"),
    }
print(json.dumps(found))
"""

# {unit or drop-in: its text}; -> makes a symlink.
FILES = {
    "read-a.service": """\
; a comment
[Unit]
Wants=w1.service \\
# a comment inside
    w2.service
Requires=r1.service
Requires=
StopWhenUnneeded=yes
StopWhenUnneeded=perhaps
[Service]
Environment=A=1
Environment=
Environment=B=b C=c \\
  D=%%
ExecStart=/bin/sleep 60
Restart=always
RestartSec=2min 3s
""",
    "read-a.service.d/50-x.conf": "[Service]\nRestart=nonsense\nEnvironment=E=x\n",
    "read-a.service.d/10-y.conf": "[Service]\nRestart=on-abort\nEnvironment=F=y\n[Unit]\nWants=\n",
    "read-.service.d/20-z.conf": "[Service]\nRestartSec=7\nEnvironment=G=z\n",
    "read-.service.d/50-x.conf": "[Service]\nEnvironment=HIDDEN=1\n",
    "service.d/10-all.conf": "[Unit]\nWants=w3.service\n",
    "service.d/10-y.conf": "[Service]\nEnvironment=HIDDEN=2\n",
    "read-b.service": "-> read-a.service",
    "read-b.service.d/60-b.conf": "[Service]\nEnvironment=H=b\n",
    "read-t@.service": "[Unit]\nWants=w@%i.service v@.service\n"
    "[Service]\nExecStart=/bin/true\nEnvironment=I=%i J=%I K=%j\n",
    "read-t@one-two.service.d/x.conf": "[Service]\nEnvironment=L=one\n",
    "read-t@.service.d/x.conf": "[Service]\nEnvironment=M=all\n",
    "read-t@.service.d/y.conf": "[Service]\nEnvironment=N=%N\n",
    "read-a.service.wants/linked.service": "-> /usr/lib/systemd/system/nothing.service",
    "read-a.service.requires/needed.service": "-> ../needed.service",
    "needed.service": "[Service]\nExecStart=/bin/true\n",
    "read-m.service": "-> /dev/null",
    "w1.service": "[Service]\nExecStart=/bin/true\n",
}

RUN = {
    "read-a.service.d/10-y.conf": "[Service]\nRestart=no\nEnvironment=HIDDEN=3\n",
    "read-a.service.d/30-run.conf": "[Service]\nEnvironment=O=run\n",
    "read-a.service": "[Service]\nExecStart=/bin/false\n",
    "read-m.service": "[Service]\nExecStart=/bin/true\n",
}

UNITS = ("read-a.service", "read-b.service", "read-t@one-two.service", "read-t@x.service")

PROPERTIES = (
    "Id,Names,FragmentPath,DropInPaths,Wants,Requires,Upholds,Environment,Restart,StopWhenUnneeded"
)


@scenario()
def units_are_read_as_systemd_does(m: Machine) -> str:
    """Units, drop-ins, aliases, templates and masks: our reader against systemctl show"""
    for folder, files in (("/etc/systemd/system", FILES), ("/run/systemd/system", RUN)):
        for name, text in files.items():
            path = m.write(f"{folder}/{name}", "" if text.startswith("-> ") else text)
            if text.startswith("-> "):
                m.sh(f"ln -sf {text[3:]} {path}")
    m.sh("systemctl daemon-reload")
    python = m.program.replace("systemd-socket-proxyd", "python")
    ours = json.loads(m.sh(f"{python} - {' '.join(UNITS)} read-m.service", stdin=READ))
    same("a masked unit", ours.pop("read-m.service"), None)
    for unit, read in ours.items():
        compare(m, unit, read)
    return f"{len(ours)} units"


def compare(m: Machine, unit: str, read: dict) -> None:
    lines = m.sh(f"systemctl show --property={PROPERTIES} {unit}").splitlines()
    shown = dict(line.split("=", 1) for line in lines)
    for name in ("Id", "FragmentPath", "Restart"):
        same(f"{name} of {unit}", read[name], shown[name])
    same(
        f"StopWhenUnneeded= of {unit}", read["StopWhenUnneeded"], shown["StopWhenUnneeded"] == "yes"
    )
    same(f"drop-ins of {unit}", read["DropInPaths"], shown["DropInPaths"].split())
    words = (word.split("=") for value in read["Environment"] for word in value.split())
    merged = [f"{name}={value}" for name, value in dict(words).items()]  # the last of a name counts
    same(f"Environment= of {unit}", merged, shown["Environment"].split())
    for name in ("Names", "Wants", "Requires", "Upholds"):
        # The manager adds dependencies of its own, on what is there before any service.
        told = {word.strip('"') for word in shown[name].split()}
        told = {word for word in told if not word.endswith((".target", ".slice", "-.mount"))}
        same(f"{name} of {unit}", set(read[name]), told)
