"""Hostile clients: the others are served meanwhile, the log stays readable, memory stays bounded.

    ci/test hostile
    ci/test hostile -- --seconds N            the length of each attack (3)
    ci/test hostile -- --only flood,resets    these attacks; `held` is the measurement of memory
    ci/test hostile -- --clients N            how many clients that measurement takes (20)

Each attack runs on a proxy of its own, between TCP and UNIX sockets in every mix, with two
well-behaved clients on each: one stays, and one connects again and again. Each of their exchanges
must be answered with the right bytes; only during `flood`, which fills the limit, may new
connections be refused. The time that an answer took is reported; the verdict does not depend on it.
The program must log each kind of line at most once in 5 s, have closed all sockets afterwards, and
end with status 0 on SIGTERM.

`held` is about clients that send and never read, with targets that do the same: what the program
then holds for each, in its own memory, in pipes and in socket buffers, against what the code says
is the most.

Exit status: 0 all held, 1 something did not, 77 this machine cannot run it.
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
    parser.add_argument("--only", default=",".join([*ATTACKS, "held"]))
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--threads", help="--threads= of the proxies")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--executable", required=True, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    unknown = set(chosen.only.split(",")) - {*ATTACKS, "held"}
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
