# Whether a target is up, and what follows from that.
#
#   state         what is sent                                   left by
#   TARGET_DOUBT  one datagram at a time, which stays in hand    the verdict: UP or DOWN
#                 until there is a verdict
#   TARGET_UP     everything                                     a send that fails, or an error that
#                                                                came for a flow: DOUBT
#   TARGET_DOWN   nothing; a listener is read until it has       the policy's probe: DOUBT
#                 something in hand
#
# The verdict on a target on this machine is there when send(2) returns: UNIX sockets tell it by
# its errno, UDP sockets in SO_ERROR. A target on another host is up if it replies, down if an error
# comes, and believed to be up if neither happens for a while. A datagram that is refused in doubt
# is still in hand, so it can be sent again. No other datagram ever is.

from proxyd.relay.flow cimport flow_count
from proxyd.relay.flow_address cimport name_make_definite
from proxyd.relay.flow_held cimport held_drop_one, held_first, held_next_start, held_take
from proxyd.relay.flow_tell cimport flows_tell
from proxyd.relay.flow_types cimport (
    DROP_DOWN, TARGET_DOUBT, TARGET_DOWN, TARGET_UP, TELL_DOWN, TELL_HOLDS, TELL_UP, Flow,
    FlowListener, FlowTarget, Flows, Held, Name,
)
from proxyd.relay.sys cimport AF_UNIX, EHOSTUNREACH, memcmp, uint32_t
from proxyd.relay.types cimport TO_TARGET

cdef enum:
    SILENCE_MS = 20            # after which a target on another host is believed to be up …
    UNREACHABLE_MS = 3100      # … or this, if its host did not answer: ARP takes 3 s to find out
    TELL_MS = 1000             # failures of a target that holds nothing are not told more often


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────

cdef inline void target_judge(
    Flows *flows, FlowTarget *target, FlowListener *listener, Flow *flow
) noexcept nogil:
    """The first datagram in hand was sent over `flow`: wait for what comes of it."""
    target.judged = listener
    target.judged_flow = flow
    target.verdict_ms = flows.worker.ctx.now_ms + (
        UNREACHABLE_MS if target.unreachable else SILENCE_MS)


cdef inline void target_replied(Flows *flows, FlowTarget *target) noexcept nogil:
    """A reply has come over one of its flows."""
    if target.state == TARGET_DOUBT:
        target_passes(flows, target)


cdef inline void target_was_silent(Flows *flows, FlowTarget *target) noexcept nogil:
    """If the time for an error is over: none has come."""
    if target.judged != NULL and flows.worker.ctx.now_ms >= target.verdict_ms:
        target_passes(flows, target)


cdef inline void target_passes(Flows *flows, FlowTarget *target) noexcept nogil:
    """It is up. What is judged, if anything, was delivered."""
    cdef FlowListener *listener = target.judged
    if listener != NULL and held_first(listener) != NULL:
        held_was_delivered(listener, target.judged_flow)
    target.judged = NULL
    target.judged_flow = NULL
    target.unreachable = False
    target.state = TARGET_UP
    if target.reported:
        target.reported = False
        target_tell(flows, target, TELL_UP, 0)


cdef inline void held_was_delivered(FlowListener *listener, Flow *flow) noexcept nogil:
    """The first datagram in hand was; flow == NULL: over one that has ended."""
    cdef Held *held = held_first(listener)
    cdef uint32_t size = held_next_start(held) - held.start
    if flow != NULL:
        flow_count(flow, TO_TARGET, 1, size)
    held_take(listener, held, held.start + size)


cdef inline void target_errs(
    Flows *flows, FlowTarget *target, Flow *flow, int error
) noexcept nogil:
    """An error has come for one of its flows (NULL: for a new one), by itself or instead of a send.
    """
    if flow != NULL:
        flow.failed = 1
    if target.judged != NULL and target.judged_flow == flow:
        target_fails(flows, target, error)
    elif target.state == TARGET_UP:
        target.state = TARGET_DOUBT
        target.unreachable = error == EHOSTUNREACH


cdef inline void target_fails(Flows *flows, FlowTarget *target, int error) noexcept nogil:
    """It cannot be given the first datagram in hand."""
    cdef FlowListener *listener = target.judged
    target.judged = NULL
    target.judged_flow = NULL
    target.unreachable = error == EHOSTUNREACH
    if target.holds:
        target.state = TARGET_DOWN
        target.reported = True
        target_tell(flows, target, TELL_DOWN, error)
        return
    target.state = TARGET_DOUBT
    if listener != NULL:
        held_drop_one(listener, DROP_DOWN)
    if target.told_ms == 0 or flows.worker.ctx.now_ms >= target.told_ms + TELL_MS:
        target.told_ms = flows.worker.ctx.now_ms
        target.reported = True
        target_tell(flows, target, TELL_DOWN, error)


# ── what the policy does ─────────────────────────────────────────────────────────────────────────

cdef inline void target_probe(FlowTarget *target) noexcept nogil:
    """Send the first datagram in hand again, in the next turn."""
    if target.state == TARGET_DOWN and target.held > 0 and target.address.size > 0:
        target.state = TARGET_DOUBT


cdef inline void target_holds_now(Flows *flows, FlowTarget *target) noexcept nogil:
    """It is down, and something has come for it."""
    target.reported = True
    target_tell(flows, target, TELL_HOLDS, 0)


cdef inline void target_tell_again(Flows *flows, FlowTarget *target) noexcept nogil:
    """What it has not been told, if anything."""
    if target.untold:
        target_tell(flows, target, target.untold_kind, target.untold_error)


cdef inline void target_tell(
    Flows *flows, FlowTarget *target, int kind, int error
) noexcept nogil:
    """Tell the policy, or note that there was no memory to do so: a target that is down without its
    knowledge would not be probed."""
    target.untold = flows_tell(flows, kind, target.index, error) == NULL
    target.untold_kind = kind
    target.untold_error = error


cdef inline void target_move(FlowTarget *target, Name *address) noexcept nogil:
    """It has this address from now on, or (size 0) none that is known. A target that was not down
    stays what it was; one that had no address before, and is not waited for, is in doubt."""
    cdef bint known = target.address.size > 0
    if address.size > 0:
        name_make_definite(address)
    if target.address.size == address.size and (
            memcmp(&target.address.address, &address.address, address.size) == 0):
        return
    target.address = address[0]
    target.generation += 1
    target.gso_limit = <uint32_t>-1
    if address.address.ss_family == AF_UNIX:
        target.gso_limit = 0
    target_forget(target)
    if address.size == 0:
        target.state = TARGET_DOWN
    elif target.state == TARGET_UP or not known and not target.reported:
        target.state = TARGET_DOUBT


cdef inline void target_forget(FlowTarget *target) noexcept nogil:
    """Judge no datagram that was sent before."""
    target.judged = NULL
    target.judged_flow = NULL
