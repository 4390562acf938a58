"""The picture of `socket-proxyctl top` in the README, drawn from a real run.

Usage: ci/show/picture.py COMMAND FILE.svg

A proxy, its targets and clients run in this process and below it; tmux is the terminal.
"""

import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from xml.sax.saxutils import escape

COLUMNS, ROWS = 80, 15
PATIENCE = 60

NGINX, POSTGRES = "@nginx", "@postgres"
"""Targets; the second one is down."""

RATES = (3_000_000, 700_000, 48_000, 2_000, 0, 0)
"""Bytes per second of the clients."""

CELL, LINE, MARGIN = 8.4, 18, 12

STYLE = """
  rect { fill: #0d1117 }
  .bar { fill: #c9d1d9 }
  text { font: 14px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #c9d1d9;
         white-space: pre }
  .s4 { text-decoration: underline; font-weight: bold }
  .s33 { fill: #e3b341 }
  .s2 { fill: #8b949e }
  .s31 { fill: #ff7b72; font-weight: bold }
  .s7 { fill: #0d1117 }
"""


def main(command: str, file: str) -> int:
    """Draw the picture."""
    if not shutil.which("tmux"):
        print("picture: no tmux here", file=sys.stderr)
        return 1
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="top-")))
        start_nginx(stack)
        ports = start_proxy(stack, command, folder)
        for number, rate in enumerate(RATES):
            start_client(stack, ports[0], number, rate)
        stall_client(stack, ports[0])
        for number in range(2):
            connect(stack, ports[1], f"127.0.0.{20 + number}")
        screen = capture(stack, str(Path(command).with_name("socket-proxyctl")), folder)
    Path(file).write_text(drawn(screen))
    return 0


# ── what is shown ─────────────────────────────────────────────────────────────────────────────────


def start_nginx(stack: ExitStack) -> None:
    """Start a target that echoes, but reads nothing after an "s"."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind("\0" + NGINX[1:])
    listener.listen()

    def serve(client: socket.socket) -> None:
        with client:
            try:
                while (data := client.recv(1 << 16)) and data[:1] != b"s":
                    client.sendall(data)
                if data:
                    stopped.wait()
            except OSError:
                pass

    def accept() -> None:
        try:
            while True:
                in_background(serve, listener.accept()[0])
        except OSError:
            pass

    stopped = threading.Event()
    stack.callback(stopped.set)
    in_background(accept)


def start_proxy(stack: ExitStack, command: str, folder: Path) -> list[int]:
    """Start the proxy; return the ports of its two listeners."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    listen = [f"--listen={name}=127.0.0.1:{port}" for name, port in zip("wd", ports, strict=True)]
    words = [f"--inspect={folder}/inspect", "--connect-timeout=5min", *listen]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([command, *words, f"w={NGINX}", f"d={POSTGRES}"], stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    until(lambda: process.poll() is not None or (folder / "inspect").exists(), "the proxy")
    return ports


def start_client(stack: ExitStack, port: int, number: int, rate: int) -> None:
    """Connect a client that sends at a rate, and reads what comes back."""
    client = connect(stack, port, f"127.0.0.{7 + number}")
    client.sendall(b"x" * 1000)
    in_background(read_all, client)
    in_background(send_at, client, rate)


def send_at(client: socket.socket, rate: int) -> None:
    """Send `rate` bytes a second, in small pieces."""
    try:
        while rate:
            client.sendall(bytes(rate // 20))
            time.sleep(0.05)
    except OSError:
        pass


def read_all(client: socket.socket) -> None:
    """Read until the end."""
    try:
        while client.recv(1 << 16):
            pass
    except OSError:
        pass


def stall_client(stack: ExitStack, port: int) -> None:
    """Connect a client to whose bytes the target does not listen."""
    client = connect(stack, port, "127.0.0.19")
    client.setblocking(False)
    try:
        while True:
            client.send(b"s" * 65536)
    except BlockingIOError:
        pass


def connect(stack: ExitStack, port: int, source: str) -> socket.socket:
    """Return a connection to the proxy from an address of the loopback network."""
    client = socket.create_connection(("127.0.0.1", port), PATIENCE, (source, 0))
    return stack.enter_context(client)


# ── how it looks ──────────────────────────────────────────────────────────────────────────────────


def capture(stack: ExitStack, ctl: str, folder: Path) -> list[str]:
    """Run `top` in a terminal; return its lines, with escape sequences."""
    tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
    size = ["-x", str(COLUMNS), "-y", str(ROWS)]
    environment = ["env", "-i", "PATH=/usr/bin:/bin", "TERM=xterm-256color", "LANG=C.UTF-8"]
    words = [ctl, "top", f"--socket={folder}/inspect"]
    subprocess.run([*tmux, "new-session", "-d", *size, *environment, *words], check=True)
    stack.callback(subprocess.run, [*tmux, "kill-server"], check=False)

    def shown() -> list[str]:
        done = subprocess.run(
            [*tmux, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()

    wanted = re.compile(rf"Clients: {len(RATES) + 3} total.* 2 held")
    until(lambda: any(map(wanted.search, shown())), "all clients on the screen")
    time.sleep(3.5)  # rates are those of a second
    return shown()


def drawn(lines: list[str]) -> str:
    """Return the screen as an SVG."""
    width, height = round(COLUMNS * CELL + 2 * MARGIN), ROWS * LINE + 2 * MARGIN
    title = "socket-proxyctl top: live connections, their rates, and clients that wait"
    size = f'width="{width}" height="{height}"'
    svg = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size} role="img"'
    parts = [
        f"<svg {svg}>\n",
        f"<title>{title}</title>\n<style>{STYLE}</style>\n",
        f'<rect {size} rx="6"/>\n',
    ]
    for number, line in enumerate(lines):
        top = MARGIN + number * LINE
        for style, column, text in pieces(line):
            if style == "7" and column < 2:
                parts.append(f'<rect class="bar" y="{top}" width="{width}" height="{LINE}"/>\n')
            kind = f' class="s{style}"' if style else ""
            x, length = MARGIN + column * CELL, len(text) * CELL
            parts.append(
                f'<text{kind} x="{x:.1f}" y="{top + LINE - 5}" textLength="{length:.1f}">'
                f"{escape(text)}</text>\n"
            )
    return "".join([*parts, "</svg>\n"])


def pieces(line: str) -> list[tuple[str, int, str]]:
    """Split a line where it has several spaces or changes its style: (style, column, text).

    A style is one SGR number, or nothing.
    """
    found, style, column = [], "", 0
    for sequence, text in re.findall(r"\x1b\[([0-9;]*)m|([^\x1b]+)", line):
        if text:
            words = re.finditer(r"\S+( \S+)*", text)
            found += [(style, column + one.start(), one[0]) for one in words]
            column += len(text)
        else:
            known = [one for one in sequence.split(";") if one in ("2", "4", "7", "31", "33")]
            style = known[-1] if known else ""
    return found


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────


def in_background(work, *arguments) -> None:  # type: ignore[no-untyped-def]
    """Run `work` in a thread that nobody waits for."""
    threading.Thread(target=work, args=arguments, daemon=True).start()


def until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"picture: not within {PATIENCE} s: {what}")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
