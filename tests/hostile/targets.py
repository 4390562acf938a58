"""The targets of the proxy. A client's first byte chooses what its target does:

    e  echoes, and ends when the client has ended
    f  fills: sends without end, and reads nothing more
    r  sends FILL bytes and resets
    n  reads nothing more, and sends nothing

Settings: `name`; `listen`: [{"family", "address"}]. Reports "ready".
"""

import asyncio
import socket
import struct

from kit.asynchronous import listen
from kit.load import cancelled_servers, orders, read_settings, run, tell

FILL = 4 << 20
PIECE = bytes(256 * 1024)


async def serve(sock):
    """Serve one client until it has gone."""
    loop = asyncio.get_running_loop()
    try:
        mode = await loop.sock_recv(sock, 1)
        if mode == b"e":
            while data := await loop.sock_recv(sock, 1 << 16):
                await loop.sock_sendall(sock, data)
            sock.shutdown(socket.SHUT_WR)
        elif mode == b"f":
            while True:
                await loop.sock_sendall(sock, PIECE)
        elif mode == b"r":
            for _ in range(FILL // len(PIECE)):
                await loop.sock_sendall(sock, PIECE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif mode == b"n":
            await asyncio.Event().wait()
    except OSError:
        pass  # expected: these clients reset, or vanish
    finally:
        sock.close()


async def accept(listener, tasks):
    loop = asyncio.get_running_loop()
    while True:
        sock, _ = await loop.sock_accept(listener)
        task = asyncio.ensure_future(serve(sock))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def main():
    tasks = set()
    listeners = [listen(one["family"], one["address"]) for one in read_settings()["listen"]]
    accepting = [asyncio.ensure_future(accept(listener, tasks)) for listener in listeners]
    tell("ready")
    await orders(lambda word: None)
    await cancelled_servers(accepting, tasks)


if __name__ == "__main__":
    run(main)
