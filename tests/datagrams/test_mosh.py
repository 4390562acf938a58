"""mosh: a terminal over UDP, whose client and server talk all the time."""

import fcntl
import os
import pty
import re
import select
import struct
import termios

from kit.waiting import wait_until


def test_a_terminal(datagrams, programs, run):
    target, listener = datagrams.absent(), datagrams.listener()
    port = target._address[1]
    environment = os.environ | {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TERM": "xterm"}
    shell = ["--", "/bin/sh", "-c", "while read line; do echo got-$line; done"]
    server = programs.command("mosh-server", "new", "-i", "127.0.0.1", "-p", str(port), *shell)
    said = run(server, env=environment)
    key = re.search(r"MOSH CONNECT \d+ (\S+)", said)[1]
    datagrams.launch(target.text, listeners=[listener])
    client = programs.command("mosh-client", "127.0.0.1", str(listener.getsockname()[1]))
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.execvpe(client[0], client, environment | {"MOSH_KEY": key})
    seen = bytearray()

    def shows(text):
        while select.select([terminal], [], [], 0)[0]:
            try:
                seen.extend(os.read(terminal, 65536))
            except OSError:
                raise AssertionError(f"mosh-client has ended: {bytes(seen)!r}") from None
        return text in seen

    try:
        for number in range(20):
            os.write(terminal, b"line%d\r" % number)
            wait_until(
                lambda one=number: shows(b"got-line%d" % one),
                f"the answer to line {number} on the screen",
            )
        os.write(terminal, b"\x04")  # the end of its input
        wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], "the end of mosh-client")
    finally:
        os.close(terminal)
