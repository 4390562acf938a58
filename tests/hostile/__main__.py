"""Attack the proxy: other clients must be served, the log stay readable, and memory stay bounded.

    ci/test hostile
    ci/test hostile -- --seconds N            the length of each attack (3)
    ci/test hostile -- --only flood,resets    these attacks; `held` measures memory instead
    ci/test hostile -- --clients N            the number of clients in that measurement (20)
    ci/test hostile -- --sources N            the number of forged sources of `spoofed` (200000)

Each attack runs on a proxy of its own, between TCP and UNIX sockets in every combination. Each
listener also has two well-behaved clients: one keeps its connection, and one connects again and
again. Each of their messages must be answered with the right bytes; new connections may be refused
only during `flood`, which fills the limit. Response times are reported, but do not affect the
verdict. The program must log each kind of line at most once in 5 s, close all sockets afterwards,
and exit with status 0 on SIGTERM.

In `one-source` thousands of connections come from one address, which has a share of the limit. In
`headers` thousands of clients that should begin with a PROXY header do not, or never end it.

In `callers` other users attack the inspection socket: root's calls must be answered in full.

`held` uses clients that send and never read, and targets that do the same. It compares what the
program then holds for each client, in its own memory, in pipes and in socket buffers, with the
maximum that the code allows.

`spoofed` sends datagrams with forged sources, two of each. A client that talks and a connection
must be served, and flows and memory stay bounded.

Exit status: 0 all passed, 1 something failed, 77 this machine cannot run it.
"""

import argparse
import sys

from hostile.attacks import ATTACKS
from hostile.hostile import Hostile
from kit.namespaces import enter_network_for


def options():
    parser = argparse.ArgumentParser(
        prog="ci/test hostile --",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default=",".join([*ATTACKS, "held", "spoofed"]))
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--sources", type=int, default=200_000)
    parser.add_argument("--threads", help="--threads= of the proxies")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--executable", required=True, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    unknown = set(chosen.only.split(",")) - {*ATTACKS, "held", "spoofed"}
    if unknown:
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    return chosen


def main():
    chosen = options()
    if not enter_network_for("ci/test hostile"):
        return 77
    return Hostile(chosen).run()


if __name__ == "__main__":
    sys.exit(main())
