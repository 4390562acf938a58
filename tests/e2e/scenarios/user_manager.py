"""Units of a user's own service manager (systemctl --user)."""

from e2e.harness import scenario
from e2e.machine import Machine, same
from e2e.scenarios.transfers import MAKE_FILE, sha256

USER = "e2e-user"
CURL = "curl -sS --max-time 20"

PROXY_SOCKET = "[Socket]\nListenStream=127.0.0.1:9000\nListenStream=%t/proxy\n"

PROXY_SERVICE = """
[Unit]
Requires=app.service
After=app.service
[Service]
Type=notify
WatchdogSec=5s
ExecStart={program} --exit-idle-time=1s {target}
NoNewPrivileges=yes
"""

APP_SERVICE = """
[Unit]
StopWhenUnneeded=yes
[Service]
ExecStart=python3 -m http.server --bind 127.0.0.1 --directory {folder} 8000
"""


class UserManager:
    """The user's manager, started by hand; `end` stops it and removes the user."""

    def __init__(self, m: Machine):
        self.m = m
        m.sh(f"useradd --create-home {USER}")
        self.number = m.sh(f"id -u {USER}").strip()
        self.folder = f"/home/{USER}/.config/systemd/user"
        runtime = f"XDG_RUNTIME_DIR=/run/user/{self.number}"
        self.systemctl = f"runuser -u {USER} -- env {runtime} systemctl --user"
        m.sh(f"runuser -u {USER} -- mkdir -p {self.folder}")
        m.start(f"user@{self.number}.service")

    def sh(self, script: str) -> str:
        """Run a script as the user, in whose session `systemctl --user` works."""
        user = f"runuser -u {USER} -- env XDG_RUNTIME_DIR=/run/user/{self.number} bash -ec"
        return self.m.sh(f"{user} '{script}'")

    def unit(self, name: str, text: str) -> None:
        self.m.sh(f"cat >{self.folder}/{name}", stdin=text)

    def show(self, unit: str, prop: str) -> str:
        return self.sh(f"systemctl --user show --value -p {prop} {unit}").strip()

    def restart(self) -> None:
        """Start the manager anew."""
        self.m.sh(f"systemctl restart user@{self.number}.service")
        self.m.wait_for(
            "it has started", lambda: self.show("default.target", "ActiveState") == "active"
        )

    def end(self) -> None:
        self.m.run(
            f"systemctl stop user@{self.number}.service user-runtime-dir@{self.number}.service"
        )
        self.m.sh(f"userdel --force --remove {USER} 2>/dev/null")


@scenario(original="gives up at the first ECONNREFUSED")
def user_manager(m: Machine) -> None:
    """systemctl --user: sockets on TCP and in %t, notify, watchdog, on demand, idle stop"""
    user = UserManager(m)
    try:
        serve_user(m, user)
    finally:
        user.end()


def serve_user(m: Machine, user: UserManager) -> None:
    m.sh(MAKE_FILE.format(size=20_000_000, path=f"{m.folder}/file"))
    user.unit("app.service", APP_SERVICE.format(folder=m.folder))
    user.unit("proxy.socket", PROXY_SOCKET)
    user.unit("proxy.service", PROXY_SERVICE.format(program=m.program, target="127.0.0.1:8000"))
    user.sh("systemctl --user daemon-reload; systemctl --user start proxy.socket")
    wanted = sha256(m, f"{m.folder}/file")
    by_unix = f"--unix-socket /run/user/{user.number}/proxy"
    for where in ("http://127.0.0.1:9000/file", f"{by_unix} http://localhost/file"):
        same("app before", user.show("app.service", "ActiveState"), "inactive")
        got = user.sh(f"{CURL} {where} | sha256sum").split()[0]
        same(where, got, wanted)
        same(
            "proxy's user",
            m.sh(f"stat -c %U /proc/{user.show('proxy.service', 'MainPID')}"),
            f"{USER}\n",
        )
        m.wait_for("idle", lambda: user.show("app.service", "ActiveState") == "inactive")
        same("result", user.show("proxy.service", "Result"), "success")
    user.sh(
        "systemctl --user start proxy.service; systemctl --user stop proxy.socket proxy.service"
    )
    same("result of a stop", user.show("proxy.service", "Result"), "success")
