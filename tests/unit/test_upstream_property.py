"""Whatever happens, each client is in one place, and there is no busy loop."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.fake_relay import LATER, UP
from kit.upstream_world import EPOLLHUP, NAME, TCP, World, inet

from proxyd import happy_eyeballs, log

STATES = st.sampled_from(
    [UP, LATER, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EPERM, errno.ENOENT]
)
MOMENTS = st.lists(
    st.tuples(
        st.integers(0, 3000),
        st.sampled_from(["come", "come", "go", "change", "answer", "fail", "say", "look"]),
        STATES,
        st.integers(0, 100),
    ),
    max_size=25,
)


@given(STATES, MOMENTS, st.sampled_from([0, 700, None]), st.booleans(), st.sampled_from([0, 50]))
def test_whatever_happens_each_client_is_in_one_place(first, moments, timeout_ms, named, settle_ms):
    """Served, held or closed; a target with held clients is probed; no busy loop (see run())."""
    addresses = [inet(1), inet(2)]
    if named:
        one = World(
            NAME,
            dict.fromkeys(addresses, first),
            timeout_ms,
            answer=([inet(1, 0), inet(2, 0)], None),
            settle_ms=settle_ms,
        )
    else:
        one = World(TCP, first, timeout_ms, settle_ms=settle_ms)
        addresses = [one.address]
    with pytest.MonkeyPatch.context() as patch:
        one.relay.replace_functions(patch)
        patch.setattr(log, "_log", lambda level, text, fields=None: None)
        for after_ms, what, state, choice in moments:
            one.run(one.now_ms + after_ms)
            address = addresses[choice % len(addresses)]
            held = one.held
            pending = list(one.relay.dialled)
            if what == "come":
                one.come()
            elif what == "go" and held:
                fd = held[choice % len(held)]
                if choice % 3:  # it has sent something, and is served all the same
                    one.peers[fd].send(b"x")
                one.ready(fd, EPOLLHUP)
            elif what == "say" and pending:
                fd = pending[choice % len(pending)]
                one.relay.received[fd] = (1, 0, -errno.ECONNRESET)[choice % 3]
                one.ready(fd, 1)
            elif what == "look" and named:
                one.names.say(choice)
            elif what == "change":
                one.relay.plan[address] = state
            elif what == "answer" and pending:
                fd = pending[choice % len(pending)]
                if one.upstream._attempts._attempts[fd].settled_ms is not None:
                    continue  # it is connected already
                one.relay.dialled[fd] = {UP: 0, LATER: errno.EINPROGRESS}.get(state, state)
                one.ready(fd, 4)
            one.tick()
            one.assert_counted()
            assert len(one.relay.dialled) <= max(len(one.held), 1) + happy_eyeballs.SPARE
            served, held = set(one.served), set(one.held)
            assert served.isdisjoint(held)
            assert all(one.gone(fd) == (fd not in served | held) for fd in one.peers)
            assert set(one.relay.watched) == held
            if held:  # step() will be called, or the target or a name server must answer
                waits = one.relay.dialled or (named and one.names.waiting)
                assert one.upstream.next_ms() is not None or waits
            if held and timeout_ms:
                assert one.upstream.next_ms() <= one.relay.now_ms + timeout_ms
            if not held:
                assert not one.relay.dialled
        one.close()
