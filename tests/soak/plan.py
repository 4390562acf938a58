"""What the two ends of a connection do. The client sends the plan to the server first."""

import random
import struct
from dataclasses import dataclass

END, RESET, CLOSE = range(3)
"""How a side ends after its last byte: half-close, reset or plain close."""

FATES = ("end", "reset", "close")

EXCHANGE, ECHO, SINK, SLEEP = range(4)
"""EXCHANGE follows both scripts, ECHO sends back, SINK counts, and SLEEP waits to be cut."""

KINDS = ("exchange", "echo", "sink", "sleep")

_SCRIPT = "QIQIBBQ"
_HEAD = struct.Struct("!4sQBH" + _SCRIPT * 2)
_MAGIC = b"soak"
HEAD_SIZE = _HEAD.size
NEVER = (1 << 64) - 1


@dataclass(frozen=True)
class Script:
    """One side: sends `length` bytes in writes of `chunk`; stops reading at byte `stall_at` for
    `stall_ms`; if `late`, sends only once the other side has ended; byte `urgent_at` is urgent."""

    length: int = 0
    chunk: int = 1 << 16
    stall_at: int = NEVER
    stall_ms: int = 0
    fate: int = END
    late: int = 0
    urgent_at: int = NEVER

    def __str__(self):
        told = [f"{self.length} bytes in writes of {self.chunk}, then {FATES[self.fate]}"]
        if self.late:
            told.append("after the other's end")
        if self.stall_ms:
            told.append(f"reading stalls at {self.stall_at} for {self.stall_ms} ms")
        if self.urgent_at != NEVER:
            told.append(f"urgent at {self.urgent_at}")
        return ", ".join(told)

    def fields(self):
        return (
            self.length,
            self.chunk,
            self.stall_at,
            self.stall_ms,
            self.fate,
            self.late,
            self.urgent_at,
        )


@dataclass(frozen=True)
class Plan:
    """One connection: its number, its two scripts, and the client's port for a PROXY header."""

    number: int
    kind: int = EXCHANGE
    client: Script = Script()
    server: Script = Script()
    port: int = 0

    def pack(self):
        scripts = self.client.fields() + self.server.fields()
        return _HEAD.pack(_MAGIC, self.number, self.kind, self.port, *scripts)

    def __str__(self):
        sides = f"; client: {self.client}; server: {self.server}" if self.kind == EXCHANGE else ""
        return f"connection {self.number}, {KINDS[self.kind]}{sides}"


def unpack(head):
    """Return the Plan in the first HEAD_SIZE bytes of a connection. Raises ValueError."""
    magic, number, kind, port, *rest = _HEAD.unpack(head)
    if magic != _MAGIC or kind >= len(KINDS):
        raise ValueError(f"a connection begins with {head.hex()}")
    half = len(rest) // 2
    return Plan(number, kind, Script(*rest[:half]), Script(*rest[half:]), port)


def draw(dice, number, *, stall_ms, may_urge):
    """Return a random Plan for an exchange. `may_urge`: whether each leg (the client's, the
    server's) is TCP and so may carry an urgent byte."""
    both_end = dice.random() < 0.6
    client = _script(dice, both_end, stall_ms, may_urge[0])
    server = _script(dice, both_end, stall_ms, may_urge[1])
    if both_end and dice.random() < 0.2:  # the server replies after the client's end
        server = Script(server.length, server.chunk, late=1)
    return Plan(number, EXCHANGE, client, server)


def _script(dice, ends, stall_ms, may_urge):
    length = _log_uniform(dice, 1 << 22)
    stalls = dice.random() < 0.15
    return Script(
        length=length,
        chunk=dice.choice((1 << 16, 1 << 16, 4096, max(length // 64, 1))),
        stall_at=dice.randrange(length + 1) if stalls else NEVER,
        stall_ms=dice.randrange(stall_ms) if stalls else 0,
        fate=END if ends else dice.choice((END, RESET, CLOSE)),
        urgent_at=dice.randrange(length) if may_urge and length and dice.random() < 0.1 else NEVER,
    )


def _log_uniform(dice: random.Random, maximum):
    """Return 0 now and then; otherwise all orders of magnitude are equally likely."""
    return 0 if dice.random() < 0.05 else int(maximum ** dice.random())
