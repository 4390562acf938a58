"""Rows: what is told about one client, as the Connection of the interface.

A row is made as text at once: `json` takes five times as long for it, while the relay waits.
"""

import json
import sys
import time
from _socket import inet_ntop

from proxyd import address as sockaddr
from proxyd.acceptor import Acceptor
from proxyd.inspection.varlink import plain

TYPE_CHECKING = False  # as in typing
if TYPE_CHECKING:
    from proxyd._datagram import FlowInfo
    from proxyd._relay import ConnectionInfo
    from proxyd.header_reader import Sender
    from proxyd.held import HeldClient

Row = str
"""A JSON object."""

_TEXTS_MAX = 1000
"""How many texts are kept."""

_NOTHING = '{"bytes":0,"inFlight":0,"state":"flowing","datagrams":null}'
"""A half of a client that waits."""

_INET = sockaddr.AF_INET.to_bytes(2, sys.byteorder)


class RowMaker:
    """Makes the rows of one moment."""

    __slots__ = ("_names", "_now_ms", "_real_us")

    def __init__(self, names: "Names", now_ms: int) -> None:
        self._names = names
        self._now_ms = now_ms
        self._real_us = time.time_ns() // 1000

    def connection(self, info: "ConnectionInfo") -> Row:
        """Return the row of a connection."""
        names, up, down = self._names, info.up, info.down
        held = info.held_ms * 1000 if info.held_ms else "null"
        accepted_ms = info.opened_ms - info.held_ms
        return (
            f'{{"id":{info.connection},"state":"{info.state}",'
            f'"listener":{names.quoted(names.listener(info.listener))},'
            f'"client":{_quoted_address(info.client)},"clientPID":{info.client_pid or "null"},'
            f'"target":{names.quoted(names.target(info))},'
            f'"targetAddress":{names.address(info.target)},"localAddress":{_local(info.local)},'
            f'"sinceUSec":{self.since_us(accepted_ms)},"ageUSec":{self._span(accepted_ms)},'
            f'"idleUSec":{self._span(info.active_ms)},"heldUSec":{held},'
            f'"connectUSec":{"null" if info.connect_us < 0 else info.connect_us},'
            f'"up":{{"bytes":{up.bytes},"inFlight":{up.in_flight},"state":"{up.state}",'
            f'"datagrams":null}},'
            f'"down":{{"bytes":{down.bytes},"inFlight":{down.in_flight},"state":"{down.state}",'
            f'"datagrams":null}},'
            f'"thread":{info.thread}}}'
        )

    def waiting(self, target: str, client: "HeldClient | Sender") -> Row:
        """Return the row of a client that waits, or did at this moment."""
        names = self._names
        age_us = self._span(client.since_ms)
        held = age_us if client.state == "held" else "null"
        listener = client.listener
        name = names.listener(listener) if isinstance(listener, int) else listener.text
        return (
            f'{{"id":{client.id},"state":"{client.state}","listener":{names.quoted(name)},'
            f'"client":{_quoted_address(client.peer)},"clientPID":{client.pid or "null"},'
            f'"target":{names.quoted(target)},"targetAddress":null,"localAddress":null,'
            f'"sinceUSec":{self.since_us(client.since_ms)},"ageUSec":{age_us},'
            f'"idleUSec":{age_us},"heldUSec":{held},"connectUSec":null,'
            f'"up":{_NOTHING},"down":{_NOTHING},"thread":0}}'
        )

    def flow(self, info: "FlowInfo") -> Row:
        """Return the row of a flow of datagrams."""
        names = self._names
        client = _local(info.client).replace("null", '""')
        return (
            f'{{"id":{info.flow},"state":"flow",'
            f'"listener":{names.quoted(names.listener(info.listener))},'
            f'"client":{client},"clientPID":null,'
            f'"target":{names.quoted(names.flow_target(info))},'
            f'"targetAddress":{names.address(info.target)},"localAddress":{_local(info.own)},'
            f'"sinceUSec":{self.since_us(info.opened_ms)},"ageUSec":{self._span(info.opened_ms)},'
            f'"idleUSec":{self._span(info.active_ms)},"heldUSec":null,"connectUSec":null,'
            f'"up":{_way(info.bytes_up, info.datagrams_up)},'
            f'"down":{_way(info.bytes_down, info.datagrams_down)},"thread":0}}'
        )

    def since_us(self, since_ms: int) -> int:
        """Convert a moment of the relay's clock to microseconds since 1970."""
        return self._real_us - (self._now_ms - since_ms) * 1000

    def _span(self, since_ms: int) -> int:
        """Return the microseconds since a moment, which another thread may have set just now."""
        return max(self._now_ms - since_ms, 0) * 1000


class Names:
    """What many rows have in common: listeners, targets and their addresses."""

    __slots__ = ("_addresses", "_listeners", "_quoted")

    def __init__(self, acceptor: Acceptor) -> None:
        self._listeners = acceptor.listeners
        self._quoted: dict[str, str] = {}
        self._addresses: dict[bytes, str] = {}

    def listener(self, index: int) -> str:
        """Return the listener that clients came from; "" if it was one of the last process."""
        return self._listeners[index].text if index >= 0 else ""

    def target(self, info: "ConnectionInfo") -> str:
        """Return the target of a connection as it is called on the command line.

        If the last process has connected it to another one, only the address is known.
        """
        listener = self._listeners[max(info.listener, 0)]
        target = listener.target
        if info.listener < 0 or info.upstream != target.index:
            return sockaddr.text(info.target) if info.target else ""
        if target.any_port:
            port = sockaddr.port(info.target) if info.target else listener.upstream.port
            return f"{target.text.removesuffix('*')}{port}"
        return target.text

    def flow_target(self, info: "FlowInfo") -> str:
        """Return the target of a flow, with its kind."""
        return self._listeners[info.listener].datagram_upstream.label

    def address(self, target: bytes) -> str:
        """Return the address of a target as JSON, null if it is not known."""
        if not target:
            return "null"
        text = self._addresses.get(target)
        if text is None:
            if len(self._addresses) >= _TEXTS_MAX:
                self._addresses.clear()
            text = self._addresses[target] = _quoted_address(target)
        return text

    def quoted(self, text: str) -> str:
        """Return a text as JSON."""
        found = self._quoted.get(text)
        if found is None:
            if len(self._quoted) >= _TEXTS_MAX:
                self._quoted.clear()
            found = self._quoted[text] = _quote(text)
        return found


def _way(size: int, datagrams: int) -> str:
    """Return one direction of a flow."""
    return f'{{"bytes":{size},"inFlight":0,"state":"flowing","datagrams":{datagrams}}}'


def _local(address: bytes) -> str:
    """Return our own address as JSON, null if it is that of an unbound UNIX socket."""
    if not address or (
        sockaddr.family(address) == sockaddr.AF_UNIX and not sockaddr.unix_name(address)
    ):
        return "null"
    return _quoted_address(address)


def _quoted_address(address: bytes) -> str:
    if address.startswith(_INET):
        host = inet_ntop(sockaddr.AF_INET, address[4:8])
        return f'"{host}:{address[2] << 8 | address[3]}"'
    return _quote(sockaddr.text(sockaddr.unmapped(address))) if address else '""'


def _quote(text: str) -> str:
    return json.dumps(plain(text))
