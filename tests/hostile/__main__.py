"""Hostile clients: the others are served meanwhile, the log stays readable, memory stays bounded.

    ci/hostile [--seconds N]          each attack for so long (3), then what is held for one client
    ci/hostile --only flood,resets    these attacks; `held` is the measurement of memory
    ci/hostile --clients N            of the measurement: so many who send and never read (20)

Each attack meets a proxy of its own, between TCP and UNIX sockets in every mix, with two clients
who behave at each: one stays, and one comes again and again. Every exchange of theirs must be
answered with the right bytes; only `flood`, which fills the limit, may see those who come refused.
How long it took is reported, and judged by nobody. The program logs no kind of line more often than
once in 5 s, has all sockets closed afterwards, and ends with 0 on SIGTERM.

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
        prog="ci/hostile",
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
    if not enter_network_for("ci/hostile"):
        return 77
    return Hostile(chosen).run()


if __name__ == "__main__":
    sys.exit(main())
