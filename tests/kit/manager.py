"""A service manager with a descriptor store: FDSTORE=, FDSTOREREMOVE=, BARRIER= of sd_notify(3)."""

import array
import os
import select
import signal
import socket

from kit.notify import NotifySocket
from kit.waiting import wait_until

FDS_MAX = 768


class Manager(NotifySocket):
    """Stores up to `room` descriptors by their names. `deaf`: it keeps a barrier for ever."""

    def __init__(self, room=1, *, deaf=False):
        self.room = room
        self.deaf = deaf
        self.stored = []
        """(name, fd) of each descriptor, the newest first, as they are passed on."""
        self.polled = set()
        self.barriers = []
        self._settled = 0
        super().__init__()

    def receive_one(self):
        size = socket.CMSG_SPACE(FDS_MAX * 4)
        data, ancillary, _, _ = self._socket.recvmsg(1 << 16, size, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _level, _kind, packed in ancillary:
            fds.frombytes(packed)
        text = data.decode(errors="replace")
        self._obey(dict(line.partition("=")[::2] for line in text.splitlines()), fds.tolist())
        return text

    def _obey(self, fields, fds):
        if "BARRIER" in fields and self.deaf:
            self.barriers += fds
            return
        if fields.get("FDSTOREREMOVE") == "1":
            name = fields.get("FDNAME", "")
            for each in [one for one in self.stored if one[0] == name]:
                self.stored.remove(each)
                os.close(each[1])
        if fields.get("FDSTORE") == "1":
            for fd in fds:
                if len(self.stored) < self.room:
                    self.stored.insert(0, (fields.get("FDNAME", "stored"), fd))
                    if fields.get("FDPOLL") != "0":
                        self.polled.add(fd)
                else:
                    os.close(fd)
            fds = []
        for fd in fds:
            os.close(fd)

    def settle(self):
        """Wait until all has been obeyed that was sent before."""
        self._settled += 1
        line = f"SETTLED={self._settled}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(self._socket.getsockname())
            sender.send(line.encode())
        self.wait_for(line)

    def has(self, name):
        """Whether anything is stored under this name."""
        return any(one == name for one, _ in list(self.stored))

    def drop_hung_up(self):
        """Drop what reports HUP or ERR, unless it was stored with FDPOLL=0."""
        for each in list(self.stored):
            poll = select.poll()
            poll.register(each[1], 0)
            if each[1] in self.polled and poll.poll(0):
                self.stored.remove(each)
                os.close(each[1])

    def drop(self):
        """Drop what is stored, as after a stop."""
        for _, fd in self.stored:
            os.close(fd)
        self.stored.clear()

    def close(self):
        super().close()
        self.drop()
        for fd in self.barriers:
            os.close(fd)


# ── restarts ─────────────────────────────────────────────────────────────────────────────────────


def restart(stage, manager, *arguments, **options):
    """Stop the program of a stage, and start it with all that it has left."""
    stop(stage)
    manager.drop_hung_up()
    assert len(manager.stored) == 1
    start(stage, manager, *arguments, **options)
    wait_until(lambda: not manager.has("proxyd-parcel"), "FDSTOREREMOVE=1")


def stop(stage, number=signal.SIGTERM):
    """Stop it, and wait for its end."""
    stage.proxy.send_signal(number)
    assert stage.proxy.wait() == 0, stage.proxy.log()


def start(stage, manager, *arguments, listener_names=None, **options):
    """Start the program with what is stored; its listeners are all called "web" by default."""
    listeners = stage.proxy.listeners if stage.proxies else [stage.listener()]
    listeners = [one for one in listeners if isinstance(one, socket.socket)]
    own = listener_names or ["web"] * len(listeners)
    names = ":".join([*own, *[name for name, _ in manager.stored]])
    stored = [fd for _, fd in manager.stored]
    manager.clear()
    options = {"names": names, "notify": manager} | options
    stage.launch(*arguments, listeners=[*listeners, *stored], **options)
