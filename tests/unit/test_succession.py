"""What a process leaves to the next one: when that is loaded. The rest needs two processes."""

import sys

from kit.child import in_child

from proxyd import succession


def loaded():
    return {"proxyd.continuity.store", "proxyd.continuity.reload"} <= sys.modules.keys()


def loads_some_time_after_the_start():
    for name in [name for name in sys.modules if name.startswith("proxyd.continuity")]:
        del sys.modules[name]
    one = succession.Succession(None, None)
    assert one.next_ms() is None
    seen = []
    for now_ms in (500, 600, 10_499, 10_500, 20_000):
        one.step(now_ms)
        seen.append((one.next_ms(), loaded()))
    assert seen == [(10_500, False)] * 3 + [(None, True)] * 2


def test_it_is_loaded_some_time_after_the_start():
    in_child(loads_some_time_after_the_start)
