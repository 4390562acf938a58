"""Connections that go from one relay to the next, as from one process to the next."""

import array
import os
import socket

FDS_MAX = 253
"""File descriptors of one message (SCM_MAX_FD)."""

RECORD_SIZE = 408
HEAD_SIZE = 40


class Parcel:
    """What a relay has exported: a file, and a socket with the descriptors in its queue."""

    def __init__(self, relay):
        self.file = os.memfd_create("parcel")
        fds = relay.export(self.file)
        self.count = len(fds)
        sender, self.receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with sender:
            for start in range(0, len(fds), FDS_MAX):
                part = array.array("i", fds[start : start + FDS_MAX])
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, part)]
                sender.sendmsg([b"x"], ancillary, socket.MSG_DONTWAIT)

    def take_fds(self):
        """The descriptors, in order; they are the caller's."""
        fds = array.array("i")
        while True:
            size = socket.CMSG_SPACE(FDS_MAX * fds.itemsize)
            data, ancillary, _, _ = self.receiver.recvmsg(1, size)
            if not data:
                return fds.tolist()
            for _level, _type, payload in ancillary:
                fds.frombytes(payload)

    def close(self):
        """Drop it, with what is still in the queue."""
        self.receiver.close()
        os.close(self.file)


def carry_over(rig, threads=0, prepare=None, **options):
    """Have a new relay go on with the connections of a rig, and with its listener; (how many it
    goes on with, how many it could not restore). `prepare` is called with it before that."""
    before = rig.relay
    rig.listener.stop()
    rig.events += before.freeze()
    parcel = Parcel(before)
    before.release()
    assert before.connections == 0
    rig.earlier.append(before.totals())
    before.close_all()
    del before
    rig.options = rig.options | options
    rig.make_relay()
    if prepare is not None:
        prepare(rig.relay)
    for _ in range(threads):
        rig.relay.start_worker()
    try:
        result = rig.relay.import_connections(parcel.file, 0, parcel.take_fds(), [0], [0])
    finally:
        parcel.close()
    rig.relay.thaw()
    rig.listen()
    return result
