# What a relay does that has more to do than one CPU can, while another is idle (busy.pxd): it
# gives half of its work to a relay that sleeps. Where there is none yet, the boss asks for a crew.
#
# Nothing is ever taken back: the connections that come later begin with the boss again.

from proxyd.relay.busy cimport SPARE_LEAST, busy_window
from proxyd.relay.connection cimport (
    CONNECTED, CONNECTING, Connection, NOTE_BUSY, Relaying, endpoint_unregister, note_add,
    relay_left,
)
from proxyd.relay.pump cimport Endpoint
from proxyd.relay.mailbox cimport inbox_put
from proxyd.relay.sys cimport (
    AF_UNIX, SOL_SOCKET, SO_LINGER, counter_add, hint_get, linger, setsockopt, shared_add,
    shared_get,
)
from proxyd.relay.list cimport Link, list_remove
from proxyd.relay.quarantine cimport quarantine_put, quarantine_runs, quarantine_want
from proxyd.relay.rights cimport RIGHTS_ANY

cdef enum:
    GIVE_MOST = 32             # connections at a time: each costs four epoll_ctl


cdef inline bint relay_overflows(Relaying *relay) noexcept nogil:
    """Whether a window has ended after which the relay is to give work away."""
    cdef Relaying *boss = relay if relay.boss == NULL else relay.boss
    if not relay.shares:
        return False
    if relay.engine.now_ms - relay.busy.since_ns // 1000000 < boss.crew.window_ms:
        return False
    if not busy_window(&relay.busy, &boss.crew.machine, relay.engine.buffer,
                       relay.engine.stream_unit):
        return False
    return relay.busy.spare >= SPARE_LEAST


cdef inline void relay_share(Relaying *relay) noexcept nogil:
    """Give every second connection that has just moved bytes to a relay that sleeps.

    Only at the end of a turn: an event that is yet to be worked on may point to one of them.
    """
    cdef Relaying *boss = relay if relay.boss == NULL else relay.boss
    cdef Relaying *other
    cdef Link *link = relay.live.prev
    cdef Link *before
    cdef int count = 0
    if boss.crew.count == 0:
        relay_ask_for_crew(boss)
        return
    other = crew_sleeper(boss)
    while other != NULL and link != &relay.live and count < 2 * GIVE_MOST:
        before = link.prev
        if (<Connection *>link.owner).active_ms < relay.engine.now_ms - boss.crew.window_ms:
            return  # nor has any that is further ahead in the list
        if connection_can_move(<Connection *>link.owner):
            if count % 2 == 1:
                connection_give(relay, other, <Connection *>link.owner)
            count += 1
        link = before


cdef inline void relay_ask_for_crew(Relaying *boss) noexcept nogil:
    """Once: the policy may find that there can be none."""
    if not boss.crew.asked_for:
        boss.crew.asked_for = note_add(boss, NOTE_BUSY, -1, 0, 0) != NULL


cdef inline Relaying *crew_sleeper(Relaying *boss) noexcept nogil:
    """Of the relays that wait for events, the one with the fewest connections; NULL: none does."""
    cdef Relaying *found = boss if hint_get(&boss.asleep) else NULL
    cdef Relaying *relay
    cdef int i
    for i in range(boss.crew.count):
        relay = boss.crew.relays[i]
        if hint_get(&relay.asleep) and (
                found == NULL or shared_get(&relay.open) < shared_get(&found.open)):
            found = relay
    return found


cdef inline bint connection_can_move(const Connection *c) noexcept nogil:
    """While it has a time limit, or is about to end, its relay's list of those has it."""
    return c.state == CONNECTED and c.wake_ms == 0


cdef inline void connection_give(Relaying *relay, Relaying *other, Connection *c) noexcept nogil:
    """With all it holds. It begins there as new ones do, with a pump, and then asks that epoll."""
    endpoint_unregister(&relay.engine, &c.client)
    endpoint_unregister(&relay.engine, &c.target)
    list_remove(&c.again)
    list_remove(&c.exile)
    relay_left(relay)
    shared_add(&other.open, 1)
    counter_add(&relay.handed_over, 1)
    inbox_put(&other.inbox, &other.inbox.begin, &c.live)


# ── into quarantine ──────────────────────────────────────────────────────────────────────────

cdef inline void endpoint_exile(Relaying *relay, Endpoint *end) noexcept nogil:
    """Where the thread still waits when the program ends, the kernel closes its sockets: that is no
    clean end."""
    cdef linger now
    if end.fd < 0:
        return
    endpoint_unregister(&relay.engine, end)
    end.rights.state = RIGHTS_ANY
    end.rights.left = 0
    end.readable = 1
    if end.family != AF_UNIX:
        now.l_onoff = 1
        now.l_linger = 0
        setsockopt(end.fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now))


cdef inline void connection_exile(Relaying *relay, Connection *c) noexcept nogil:
    """With all it holds, its time limit too. It begins there as one does that was given away."""
    cdef Relaying *boss = relay if relay.boss == NULL else relay.boss
    endpoint_exile(relay, &c.client)
    endpoint_exile(relay, &c.target)
    list_remove(&c.again)
    list_remove(&c.exile)
    list_remove(&c.timed)
    relay_left(relay)
    shared_add(&boss.crew.quarantine.open, 1)
    quarantine_put(relay.quarantine, &c.live)


cdef inline void relay_exile(Relaying *relay) noexcept nogil:
    """Only at the end of a turn, as relay_share()."""
    cdef Link *link = relay.exiles.next
    cdef Link *after
    if not quarantine_runs(relay.quarantine):
        quarantine_want(relay.quarantine)
        return
    while link != &relay.exiles:
        after = link.next
        if (<Connection *>link.owner).state != CONNECTING:
            connection_exile(relay, <Connection *>link.owner)
        link = after
