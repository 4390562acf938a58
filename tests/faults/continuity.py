"""Scenarios of the walk with connections that are kept in case of a kill, or go on after one."""

from faults.scenarios import BULK, SCENARIOS, scenario
from faults.world import half_close
from kit.traffic import payload

__all__ = ["SCENARIOS"]

TCP, UNIX, MIXED = ("tcp4", "tcp4"), ("unix", "unix"), ("unix", "tcp4")

OLD_MS = 1000
"""The age from which on connections are kept."""

ALL = {"options": ["--crash-recovery=all"], "quarantines": True}


@scenario(pairs=[MIXED, TCP, UNIX], keeps=True, **ALL)
def kept(world):
    """Connections in several states get old and are kept, exchange more, and end."""
    conns = yield from several_states(world)
    yield from until_kept(world)
    conns[0].say(payload(70_000, 7), then=None)
    yield from world.until_still()
    yield from until_kept(world)
    yield from finish(world, conns)


@scenario(pairs=[("tcp4", "unix")], keeps=True, copies=True, quick=False, **ALL)
def kept_copied(world):
    """As kept, without splice."""
    yield from kept(world)


@scenario(
    keeps=True, options=["--crash-recovery=all", "--threads=2", "--hand-over=always"], quick=False
)
def kept_threads(world):
    """As kept, with two relay threads."""
    yield from kept(world)


@scenario(pairs=[TCP, UNIX, MIXED], kills=1, **ALL)
def recovered(world):
    """A process is killed; its connections go on in the next one, and are kept again."""
    conns = yield from several_states(world)
    yield from until_kept(world)
    yield from kill(world)
    yield from world.until_still()
    yield from until_kept(world)
    conns[0].say(payload(70_000, 7), then=None)
    yield from world.until_still()
    yield from finish(world, conns)


@scenario(pairs=[TCP, ("tcp4", "unix")], kills=1, copies=True, quick=False, **ALL)
def recovered_copied(world):
    """As recovered, without splice."""
    yield from recovered(world)


@scenario(pairs=[TCP, UNIX], kills=2, quick=False, **ALL)
def recovered_again(world):
    """As recovered; but the next process is killed, too, after something has failed in it."""
    conns = yield from several_states(world)
    yield from until_kept(world)
    yield from kill(world)
    yield from world.until_still()
    conns[0].say(payload(70_000, 7), then=None)
    yield from world.until_still()
    yield from kill(world)
    yield from world.until_still()
    yield from finish(world, conns)


def several_states(world):
    """Connections that are idle, one of them with one direction at its end, and stalled ones."""
    conns = [
        world.connect(300, 50_000, then=None, answers_at_end=True),
        world.connect(300, 300, then=None),
        world.connect(BULK, BULK),
        world.connect(300, BULK // 2),
    ]
    for conn in conns[2:]:
        conn.reads = False
    yield from world.until_still()
    world.put_forward(OLD_MS)
    return conns


def until_kept(world):
    """Wait until all that have not ended are kept, or a line tells that they are not."""
    yield from world.until(
        lambda: (
            world.kept() >= sum(not conn.hangs_up for conn in world.conns) or world.tells_not_kept()
        )
    )


def kill(world):
    """Kill the program, and let the next one have its first turn."""
    before = world.processes
    world.wants_kill = True
    yield from world.until(lambda: world.processes > before)


def finish(world, conns):
    """Have all of them end."""
    for conn in conns:
        conn.reads = True
    half_close(conns[0].client)
    half_close(conns[1].client)
    yield from world.until_all_over()
