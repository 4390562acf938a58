"""A target that is up: the relay connects its clients."""

import errno

import pytest
from kit.fake_relay import UP
from kit.upstream_world import TCP, inet, up_at

from proxyd.happy_eyeballs import SILENT_MS


def test_the_relay_connects_every_client_at_once(world):
    one = world()
    clients = [one.come(), one.come()]
    assert one.served == clients
    assert one.relay.attempts == [(0, one.address, SILENT_MS)] * 2
    assert not one.held
    assert one.upstream.served == 2
    assert one.relay.watched == {}


def test_the_relay_gets_the_header_to_send(world):
    one = world()
    fd = one.come(header=b"PROXY UNKNOWN\r\n")
    assert one.relay.served == [(fd, b"PROXY UNKNOWN\r\n")]


def test_any_port_is_the_port_of_the_listener(world):
    one = world("192.0.2.9:*", plan={inet(9, 443): UP}, port=443)
    one.come()
    assert [address for _, address, _ in one.relay.attempts] == [inet(9, 443)]
    assert one.upstream.text == "192.0.2.9:443"


@pytest.mark.parametrize(
    ("timeout_ms", "kernel_ms"), [(10_000, 1000), (None, 1000), (300, 300), (0, 0)]
)
def test_how_long_a_connect_may_take(world, timeout_ms, kernel_ms):
    one = world(timeout_ms=timeout_ms)
    one.come()
    assert one.relay.attempts == [(0, one.address, kernel_ms)]


# ── the log at debug level ────────────────────────────────────────────────────────────────────────


def test_connections_have_labels_at_debug_level(world):
    one = world()
    one.loop._labels = {}
    fd = one.come()
    assert one.loop._labels == {1: f"client{fd} → {TCP}"}
    one.relay.plan[one.address] = up_at(10)
    one.fail(fd, errno.ECONNREFUSED)
    assert one.loop._labels == {}
    one.run(10)
    assert one.loop._labels == {2: f"client{fd} → {TCP}"}
