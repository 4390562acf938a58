"""A relay is killed at random instants, and the next one goes on: no byte is lost or doubled.

RELAY_KILLS=N kills that number of relays in each test.
"""

import os

import pytest
from kit.killed import Killed
from kit.privileges import locks_memory

KILLS = int(os.environ.get("RELAY_KILLS", "100"))

SEEN = ("intent: copy", "intent: flush", "spill", "killed while it started")


@pytest.fixture
def killed(tmp_path, request):
    """Makes a connection whose relays are killed."""
    made = []

    def make(*args, **options):
        made.append(Killed(*args, str(tmp_path), request.node.name, **options))
        return made[-1]

    yield make
    for each in made:
        print(dict(each.counts))
        each.close()


PAIRS = [("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp4"), ("unix", "unix")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_copies(killed, pair):
    killed(pair, may_splice=False).run(KILLS, SEEN)


@locks_memory
def test_copies_where_descriptors_may_come(killed):
    killed(("unix", "unix"), may_splice=False, may_refuse=False).run(KILLS, SEEN)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_splices(killed, pair):
    seen = SEEN if pair == ("unix", "tcp4") else ("intent: copy", "killed while it started")
    killed(pair, pages=True).run(KILLS, (*seen, "pipe"))
