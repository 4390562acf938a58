"""A container that is sent datagrams before the application in it listens; Podman runs it."""

from e2e import healing
from e2e.harness import scenario
from e2e.healing import Subject, datagrams
from e2e.machine import Machine, check, same
from e2e.scenarios.healing import NO_DATAGRAMS
from e2e.scenarios.healing_podman import configure, import_image_of_root

SOCKET = "[Socket]\nListenDatagram=127.0.0.1:9000\n"

BACK = """\
[Unit]
StopWhenUnneeded=yes
StartLimitIntervalSec=0
[Service]
{type}ExecStart=/usr/bin/podman run --rm --replace --name=back {sdnotify} \
--publish=127.0.0.1:8000:80/udp localhost/web
ExecStop=/usr/bin/podman stop --ignore back
"""

# It is slow to listen. Once it does, it tells whoever asked to be told.
APPLICATION = """#!/bin/sh
trap 'exit 0' TERM
sleep 6
socat UDP-RECVFROM:80,fork EXEC:/bin/answer &
until grep -q ':0050 ' /proc/net/udp; do sleep .1; done
test -z "$NOTIFY_SOCKET" || printf READY=1 | socat -u - "UNIX-SENDTO:$NOTIFY_SOCKET"
wait
"""
ANSWER = '#!/bin/sh\nread word\necho "answer $word"\n'


@scenario(needs="unix-dgram", original=NO_DATAGRAMS)
def rule_datagrams_before_ready(m: Machine) -> str:
    """datagrams-before-ready: it bites with Podman, `check` finds it, and its mend mends it"""
    configure(m)
    make_root(m)
    import_image_of_root(m)
    s = subject(m, "", "")
    same("rules", s.rules(), {"datagrams-before-ready"})
    check(not s.ask(15), "what comes before the application listens is answered")
    s.served("with what comes later")
    s = subject(m, "Type=notify\n", "--sdnotify=container")
    same("rules", s.rules(), set())
    check(s.ask(30), f"what comes before the application listens is lost ({s.states()})")
    return "bites with Podman, is found, and is mended"


def subject(m: Machine, type_line: str, sdnotify: str) -> Subject:
    units = {
        "heal.socket": SOCKET,
        "heal.service": healing.PROXY.replace("time=2s", "time=1min"),
        "back.service": BACK.format(type=type_line, sdnotify=sdnotify),
    }
    return Subject(m, units, address=datagrams(9000))


def make_root(m: Machine) -> None:
    """A root folder with a shell, and with socat and its libraries."""
    for name, text in (("application", APPLICATION), ("answer", ANSWER)):
        m.write(f"{m.folder}/root/bin/{name}", text, mode="755")
    m.sh(
        f"cd {m.folder}/root; cp /bin/busybox /usr/bin/socat bin; "
        "for name in sh sleep grep; do ln -s busybox bin/$name; done; "
        "for library in $(ldd bin/socat | grep -o '/[^ ]*'); do "
        "mkdir -p .$(dirname $library); cp $library .$library; done"
    )
