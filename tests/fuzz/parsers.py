"""Fuzz the parsers in one process with atheris, which follows the branches that inputs reach.

    python tests fuzz.parsers SECONDS SEED [FILE]      FILE: only this input, which was a fault

Each parser may return, or raise the errors that it documents. An input that takes more than 5 s is
a fault too.
"""

import fcntl
import os
import socket
import sys

import atheris

with atheris.instrument_imports(include=["proxyd"]):
    from proxyd import activation, address, bind, log, networks, sd_notify, target, timespan
    from proxyd.command_line import parse_args
    from proxyd.continuity import parcel
    from proxyd.errors import UsageError
    from proxyd.inspection import varlink
    from proxyd.inspection.caller import Caller, CallerGoneError
    from proxyd.proxy_protocol import pass_on
    from proxyd.received_header import SIZE_MAX, HeaderError, parse

HERE = os.path.dirname(os.path.abspath(__file__))
SLOWEST = 5
NO_FDS = 2**16
"""Used instead of fd 3 as the first of LISTEN_FDS=, to leave the fuzzer's own fds alone."""


HEAD = parcel._HEAD_SIZE

CALL = b'{"method":"a"}\0'


def text_of(data):
    """Decode as Python does for the program; arguments and variables never contain a NUL."""
    return os.fsdecode(data.replace(b"\0", b"\n"))


def command_line(data):
    words = [text_of(word) for word in data.split(b"\xff\0")]
    try:
        parse_args(["systemd-socket-proxyd", *words])
    except UsageError:
        pass


def span(data):
    try:
        value = timespan.parse(text_of(data))
    except ValueError:
        return
    assert value is None or 0 <= value < 2**64 - 1, value
    assert timespan.format_usec(value)


def where_to(data):
    try:
        made = target.parse_target(text_of(data))
    except UsageError:
        return
    assert (made.host is None) != (made.address is None)
    if made.address is not None:
        assert address.text(made.address)
    try:
        other = made.for_datagrams()
    except UsageError:
        return
    assert other.datagram
    assert (other.text, other.host) == (made.text, made.host)


def where_from(data):
    try:
        made = bind.parse_listen(text_of(data))
    except (ValueError, UsageError):
        return
    assert target.valid_name(made.name)
    address.to_socket_name(made.address)
    assert not made.datagram or address.family(made.address) != address.AF_VSOCK


def pair(data):
    name, rest = target.split_pair(text_of(data))
    text = text_of(data)
    assert rest == text if name is None else f"{name}={rest}" == text


def header_networks(data):
    try:
        found, _ = networks.parse_networks(text_of(data))
    except ValueError:
        return
    for raw, bits in found:
        assert len(raw) in (4, 16)
        assert 0 <= bits <= 8 * len(raw)


def received_header(data):
    """A header says the same again after it was passed on; the beginning of one is not refused."""
    try:
        header = parse(data)
    except HeaderError:
        return
    if header is None:
        assert len(data) < SIZE_MAX
        return
    assert 0 < header.size <= min(len(data), SIZE_MAX)
    assert parse(data[: header.size - 1]) is None
    assert parse(data[: header.size]).peer == header.peer
    if header.peer:
        assert address.text(header.peer)
    again = parse(pass_on(2, header))
    assert (again.local, again.unix, again.tlvs) == (header.local, header.unix, header.tlvs)
    assert address.unmapped(again.peer) == address.unmapped(header.peer)
    assert parse(pass_on(1, header)).size <= 107


def passed_in(data):
    """Valid LISTEN_ variables lead to fds, none of which is open."""
    pid, fds, fdnames, pidfdid = (data.split(b"\xff\0") + [b""] * 4)[:4]
    environ = {
        "LISTEN_PID": text_of(pid), "LISTEN_FDS": text_of(fds),
        "LISTEN_FDNAMES": text_of(fdnames), "LISTEN_PIDFDID": text_of(pidfdid),
    }  # fmt: skip
    environ = {key: value for key, value in environ.items() if value}
    try:
        assert activation.inherited(environ, os.getpid()) == []
    except UsageError:
        pass
    assert not environ


def word_to_the_manager(data):
    where, usec, pid = (data.split(b"\xff\0") + [b""] * 3)[:3]
    told = sd_notify.NotifySocket({"NOTIFY_SOCKET": text_of(where), "WATCHDOG_USEC": text_of(usec),
                            "WATCHDOG_PID": text_of(pid)})  # fmt: skip
    told.status(text_of(data))
    told.close()


def logging(data):
    level, stream, text = (data.split(b"\xff\0") + [b""] * 3)[:3]
    log.setup({"SYSTEMD_LOG_LEVEL": text_of(level), "JOURNAL_STREAM": text_of(stream)})
    log.error(text_of(text))


def called(data):
    """Calls are answered in their order, however they arrive; the first bad one ends that."""
    size, stream = data[0] + 1 if data else 1, data[1:].replace(b"\1", CALL)
    answered = []

    def answer(call, _peer):
        answered.append(call.method)
        return varlink.reply({})

    ours, theirs = socket.socketpair()
    with ours, theirs:
        caller = Caller(theirs.fileno(), answer, 0, lambda _caller: None)
        try:
            for at in range(0, len(stream), size):
                ours.send(stream[at : at + size])
                while caller.step(0) or drained(ours):
                    pass
        except CallerGoneError:
            pass
        caller.close()
    assert answered == methods(stream)


def drained(sock):
    """Whether there was anything to read; the caller would wait for ever for room otherwise."""
    try:
        return bool(sock.recv(1 << 20, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def methods(stream):
    """The methods of all messages before the first bad one."""
    found = []
    for message in stream.split(b"\0")[:-1]:
        try:
            found.append(varlink.parse(message).method)
        except varlink.MessageError:
            break
    return found


def text_of_a_parcel(data):
    """Whatever the last process has written, it is read, or refused as a whole."""
    version, text = data[:1], data[1:]
    head = b"proxyd-parcel %s %d" % (version if version.isdigit() else b"1", HEAD + len(text))
    file = os.memfd_create("parcel", os.MFD_ALLOW_SEALING)
    os.write(file, head.ljust(HEAD) + text)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, parcel._SEALS)
    try:
        received = parcel.Parcel(file, [])
    except parcel.ParcelError:
        return
    for block in received.blocks:
        assert not block.fds
        for key in block.values:
            for read in (block.number, block.text, block.raw):
                try:
                    read(key)
                except ValueError:
                    pass
    received.close()


PARSERS = (
    command_line, span, where_to, where_from, pair, passed_in, word_to_the_manager, logging, called,
    header_networks, received_header, text_of_a_parcel,
)  # fmt: skip


def one_input(data):
    """Fuzz the parser that the first byte chooses with the rest."""
    if data:
        PARSERS[data[0] % len(PARSERS)](data[1:])


def main():
    seconds, seed, *files = sys.argv[1:]
    activation._FDS_START = NO_FDS
    sys.stderr = os.fdopen(os.dup(2), "w")  # for tracebacks; log lines are discarded
    arguments = [
        "parsers", f"-seed={seed}", f"-timeout={SLOWEST}", "-max_len=2000", "-close_fd_mask=2",
        "-print_final_stats=1", f"-dict={HERE}/words.dict",
    ]  # fmt: skip
    arguments += files or [f"-max_total_time={seconds}"]
    atheris.Setup(arguments, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
