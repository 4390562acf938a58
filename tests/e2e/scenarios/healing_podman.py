"""Units that heal: the examples with containers, which the machine's own Podman runs.

As root, and in a user's service manager without any privilege.
"""

from e2e import healing
from e2e.harness import CannotRun, scenario
from e2e.healing import Subject, heals
from e2e.machine import Machine
from e2e.scenarios.healing import QUADLETS, WEB, UserSubject, example
from e2e.scenarios.user_manager import USER, UserManager

OF_OUR_BACKEND = (  # only it fails, crashes and dawdles when told to
    healing.crash_loop,
    healing.failing_start,
    healing.refused_start,
    healing.slow_start,
    healing.slow_stop,
)

CONTAINER, QUADLET = "web-container.service", "web.service"


@scenario(needs="--settle-time", original="has no --settle-time=", slow=True)
def podman_container(m: Machine) -> str:
    """examples/container with Podman, through what can happen to a container"""
    return as_root(m, example("container"), CONTAINER)


@scenario(needs="--settle-time", original="has no --settle-time=", slow=True)
def podman_quadlet(m: Machine) -> str:
    """examples/quadlet with Podman's own generator, through what can happen to a container"""
    need_quadlet(m)
    return as_root(m, quadlet(QUADLETS), QUADLET)


@scenario(needs="--settle-time", original="has no --settle-time=", slow=True)
def podman_rootless_container(m: Machine) -> str:
    """examples/container in a user's manager, with rootless Podman"""
    return as_user(m, example("container"), CONTAINER)


@scenario(needs="--settle-time", original="has no --settle-time=", slow=True)
def podman_rootless_quadlet(m: Machine) -> str:
    """examples/quadlet in a user's manager, with rootless Podman"""
    need_quadlet(m)
    return as_user(m, quadlet(f"{QUADLETS}/users"), QUADLET)


def need_quadlet(m: Machine) -> None:
    if m.run("test -e /usr/lib/systemd/system-generators/podman-system-generator").returncode:
        raise CannotRun("this Podman has no Quadlet")


def quadlet(folder: str) -> dict[str, str]:
    """The example, with its .container in a folder of Quadlet's."""
    units = example("quadlet")
    units[f"{folder}/web.container"] = units.pop(f"{QUADLETS}/web.container")
    units[f"{folder}/web.container.d/e2e.conf"] = "[Container]\nPodmanArgs=--cgroups=disabled\n"
    return units


def as_root(m: Machine, units: dict[str, str], backend: str) -> str:
    set_up(m)
    import_image_of_root(m)
    return heals(Subject(m, units, backend=backend, **WEB), without=OF_OUR_BACKEND)


def as_user(m: Machine, units: dict[str, str], backend: str) -> str:
    set_up(m)
    user = UserManager(m)
    try:
        import_image(user)
        return heals(UserSubject(user, units, backend=backend, **WEB), without=OF_OUR_BACKEND)
    finally:
        user.end()


def import_image_of_root(m: Machine) -> None:
    """Make the image that the containers of root run."""
    storage = STORAGE.format(run="/run/containers/storage", graph="/var/lib/containers/storage")
    m.replace("/etc/containers/storage.conf", storage)
    m.sh(f"{IMAGE} | {IMPORT}")


def import_image(user: UserManager) -> None:
    """Make the image that a user's containers run."""
    m, home, run = user.m, f"/home/{USER}", f"/run/user/{user.number}"
    storage = STORAGE.format(run=f"{run}/containers", graph=f"{home}/containers")
    m.sh(
        f"mkdir {home}/.config/containers; cat >{home}/.config/containers/storage.conf",
        stdin=storage,
    )
    m.sh(f"{IMAGE} | runuser -u {USER} -- env XDG_RUNTIME_DIR={run} {IMPORT}")


def set_up(m: Machine) -> None:
    """Configure Podman, and make the root folder of an image."""
    configure(m)
    for name, text in (("application", APPLICATION), ("answer", ANSWER)):
        m.write(f"{m.folder}/root/bin/{name}", text, mode="755")
    m.sh(
        f"cd {m.folder}/root/bin; cp /bin/busybox .; "
        "for name in sh nc sleep; do ln -s busybox $name; done"
    )


def configure(m: Machine) -> None:
    """Configure Podman for a container without devices and control groups of its own."""
    if m.run("command -v podman").returncode:
        raise CannotRun("there is no Podman")
    m.sh("systemctl start network-online.target")  # what Quadlet makes waits for it
    m.sh("chmod 666 /dev/net/tun")  # as on any machine; not so where a host gives it away
    m.write("/etc/containers/containers.conf.d/e2e.conf", CONFIGURATION)


CONFIGURATION = """\
[containers]
cgroups = "disabled"
keyring = false
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""

STORAGE = """\
[storage]
driver = "vfs"
runroot = "{run}"
graphroot = "{graph}"
"""

# It is slow to listen: until then, a published port refuses, or accepts and closes at once.
APPLICATION = """#!/bin/sh
trap 'exit 0' TERM
sleep 1
nc -ll -p 80 -e /bin/answer &
wait
"""
ANSWER = '#!/bin/sh\nread word\necho "answer $word"\n'

IMAGE = "tar -C /srv/*/root -c ."  # the folder of the scenario
IMPORT = """podman import --change 'CMD ["/bin/application"]' - localhost/web"""
