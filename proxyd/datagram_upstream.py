"""One target of datagrams: its address, and what happens while it cannot be reached.

The relay sends, and finds out whether the target is there. While it is not, datagrams wait in the
receive queues of their listeners, which the kernel bounds, and the relay has one of each in hand.
This module decides when and where the relay tries to send that one again, and when all are dropped.
"""

import _socket
import errno

from proxyd import address as sockaddr
from proxyd._datagram import DROP_DOWN, Datagrams, DatagramTarget
from proxyd._relay import Relay
from proxyd.connect_errors import describe, is_denied, is_temporary
from proxyd.outage import Outage
from proxyd.target import Target, address_source

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.resolver import Resolver

REFRESH_MS = 1000
"""While datagrams pass, a name is looked up this often, so that new flows find a new address."""

QUICK_PROBES = 5
"""Hosts ration the errors that they return: six at once …"""

SLOW_PROBE_MS = 1050
"""… and then one per second (icmp_ratelimit). A probe without one would pass for a success."""


class DatagramUpstream:
    """Has one target probed while it is down.

    Belongs to the main loop, which calls step() after every batch of events, and when next_ms()
    says so.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that it ties together
        self,
        datagrams: Datagrams,
        relay: Relay,
        resolver: "Resolver | None",
        target: Target,
        port: int,
        timeout_ms: int | None,
        index: int,
    ) -> None:
        self._relay = relay
        self._datagrams = datagrams
        self.target = target
        self.port = port
        """With `HOST:*`, the listener's."""
        self.timeout_ms = timeout_ms
        """How long datagrams are held; 0: they are not, None: forever."""
        self.text = self._with_port(target.text)
        self.label = _label(self._with_port(target.where), target)
        """The target, for those who list targets of both kinds: udp:127.0.0.1:53."""
        self.outage = Outage(self.text, "datagrams")
        self.outage.group = self.label
        self.failed_ms: int | None = None
        """When datagrams were last dropped because the target could not be reached …"""
        self.failed_why = ""
        """… and why."""
        self.relay_target = DatagramTarget(datagrams, index)
        """The relay's side of it."""
        self._source = address_source(target, port, resolver)
        self._address = b""
        """Where datagrams are sent to; b"": no address is known yet."""
        self._probes = 0
        """Since the target was last reached."""
        self._probe_ms: int | None = None
        """When to probe; None: not before the relay has said how the last one went."""
        self._refresh_ms: int | None = None
        """When to look up the name again."""
        self._refreshing = False
        """Whether that is under way."""
        self._seen_ms = 0
        """When the last datagram had passed by then."""
        self._cold = True
        """Whether the target had never been reached before its last outage."""
        if self._source.fixed is not None:
            self._set_address(self._source.fixed)

    def _with_port(self, text: str) -> str:
        return text.removesuffix("*") + str(self.port) if self.target.any_port else text

    def _set_address(self, address: bytes) -> None:
        """Send to this address from now on; b"": to none."""
        self._address = address
        self.relay_target.set_address(address or None)
        # Without an address datagrams are held all the same: the look-up is the one attempt.
        self.relay_target.holds = self.timeout_ms != 0 or not address

    @property
    def dropped(self) -> int:
        """The number of datagrams that were dropped because the target could not be reached."""
        return self.relay_target.totals().dropped[DROP_DOWN]

    # ── events ────────────────────────────────────────────────────────────────────────────────────

    def begin_to_hold(self) -> None:
        """Take the event that a datagram is held while the target is down."""
        now_ms = self._relay.now_ms
        self.outage.client_held(now_ms, first=True)
        self._probes = 0
        self._probe_ms = now_ms

    def failed(self, error: int) -> None:
        """Take the event that a datagram could not be sent, or was refused."""
        reason = self._reason(error)
        self._source.failed()
        if self.timeout_ms == 0 or not is_temporary(error, self._address):
            self._drop(reason)
            return
        now_ms = self._relay.now_ms
        if self.outage.up:
            self.outage.client_held(now_ms, first=True)
            self._probes = 0
        self._probe_ms = self._note_outage(reason, denied=is_denied(error))
        if self._probes >= QUICK_PROBES and not is_ours(self._address):
            self._probe_ms = max(self._probe_ms, now_ms + SLOW_PROBE_MS)

    def succeeded(self) -> None:
        """Take the event that the target answers, or that nothing refuses its datagrams."""
        self.outage.succeed()
        self.outage.end(self._relay.now_ms)
        self._source.succeeded(self._address, prompt=True)
        self._probes = 0
        self._probe_ms = None

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────

    def step(self, now_ms: int) -> None:
        """Do what is due."""
        if self.holds:
            deadline_ms = self._deadline_ms
            if deadline_ms is not None and now_ms >= deadline_ms:
                self._drop(self.outage.why or self._reason(errno.ETIMEDOUT))
                return
            self.outage.step(now_ms)
            if self._probe_ms is not None and now_ms >= self._probe_ms:
                self._probe(now_ms)
        self._refresh(now_ms)

    def next_ms(self) -> int | None:
        """When to call step() at the latest; None: not before the next event."""
        times = [self._refresh_ms]
        if self.holds:
            looking = self._source.looking
            times += [self._source.late_ms if looking else self._probe_ms]
            times += [self._deadline_ms, self.outage.next_ms]
        return min((time for time in times if time is not None), default=None)

    @property
    def holds(self) -> bool:
        """Tell whether datagrams wait."""
        return self.relay_target.held > 0

    @property
    def _deadline_ms(self) -> int | None:
        """Until when the oldest datagram may wait."""
        return self.relay_target.held_since_ms + self.timeout_ms if self.timeout_ms else None

    def _probe(self, now_ms: int) -> None:
        """Have the relay send the oldest datagram again, to the next address."""
        address = self._next_address(now_ms)
        if address:
            self._probes += 1
            self._probe_ms = None
            self._set_address(address)
            self.relay_target.probe()

    def _next_address(self, now_ms: int) -> bytes:
        """Return where to probe; b"" during a look-up, or if it has failed."""
        addresses = self._addresses(now_ms)
        if addresses:
            return addresses[self._probes % len(addresses)]
        if self._source.failure:
            self._lookup_failed(now_ms)
        return b""

    def _lookup_failed(self, now_ms: int) -> None:
        """Without an address, datagrams wait on or are dropped."""
        source = self._source
        if source.temporary and self.timeout_ms != 0:
            self._probe_ms = max(self._note_outage(source.failure), now_ms + source.pause_ms)
        elif not source.looking:
            self._drop(source.failure)

    def _refresh(self, now_ms: int) -> None:
        """While datagrams are sent to a name, keep its address up to date.

        As long as it is one of those of the name, it is kept. A name that is gone has none: what
        comes next is held, and the name is waited for.
        """
        if self.is_fixed or self._datagrams.flows == 0 or self.holds:
            self._refresh_ms = None
            return
        if self._refresh_ms is None or now_ms >= self._refresh_ms:
            self._refresh_ms = now_ms + REFRESH_MS
            last_ms = self._datagrams.last_ms
            self._refreshing = self._refreshing or last_ms != self._seen_ms
            self._seen_ms = last_ms
        if self._refreshing:
            addresses = self._addresses(now_ms)
            self._refreshing = self._source.looking
            if not self._refreshing and self._address not in addresses:
                self._set_address(next(iter(addresses), b""))

    def _addresses(self, now_ms: int) -> list[bytes]:
        addresses = self._source.addresses(now_ms)
        bound_to = self.target.source
        return addresses if bound_to is None else bound_to.fitting(addresses)

    @property
    def is_fixed(self) -> bool:
        """Tell whether the target has one address for ever."""
        return self._source.fixed is not None

    # ── outages ───────────────────────────────────────────────────────────────────────────────────

    def _note_outage(self, reason: str, *, denied: bool = False) -> int:
        """The target cannot be reached: log it once; return when to probe."""
        if self.outage.up:
            self._cold = self.relay_target.totals().datagrams_to_targets == 0
        now_ms, held = self._relay.now_ms, self.relay_target.held
        return self.outage.fail(reason, now_ms, held, cold=self._cold, denied=denied)

    def _drop(self, reason: str) -> None:
        """Drop everything that waits, with one line."""
        count = self.relay_target.drop_held()
        self._probe_ms = None
        self.failed_ms, self.failed_why = self._relay.now_ms, reason
        what = "" if count == 0 else f"{count} datagram{'' if count == 1 else 's'}"
        self.outage.dropped(reason, what or "datagrams")

    def _reason(self, error: int) -> str:
        return describe(error, self._address or None, self.text, "reach", self.target.source)


def _label(where: str, target: Target) -> str:
    if target.address is not None and sockaddr.family(target.address) == sockaddr.AF_UNIX:
        return f"unix-dgram:{where.removeprefix('unix:')}"
    return f"udp:{where}"


def is_ours(address: bytes) -> bool:
    """Tell whether an address is this host's own: then each refusal is reported at once."""
    family = sockaddr.family(address)
    if family not in (sockaddr.AF_INET, sockaddr.AF_INET6):
        return True
    try:
        probe = _socket.socket(family, _socket.SOCK_DGRAM)
    except OSError:
        return False
    try:
        probe.bind(sockaddr.to_socket_name(sockaddr.with_port(address, 0)))
    except OSError:
        return False
    finally:
        probe.close()
    return True
