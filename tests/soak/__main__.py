"""Mixed traffic through the installed command for a long time; flat lines, or a failure.

    ci/test --quick soak                       two minutes, as in continuous integration
    ci/test soak -- --minutes 60
    ci/bench chart .cache/soak FILE.svg        draw the run: doc/reports/soak.svg is one of an hour

Five proxies run at once, in a network of their own:

    main     TCP, IPv6 and UNIX in every mix. Targets that stay: nothing may be lost. Through it go
             one stream of 200 GB an hour, and connections that move one byte a second
    header   --proxy-protocol=v2; the header is compared with the client's address
    idle     --idle-timeout=3s; readers stall longer than that, and connections that sleep
    few      80 open files, often fewer: accept, socket and pipe2 fail
    shaky    the targets go away, killed or by themselves, and come back

Each exchange has a plan drawn at random, which both ends know: how much each sends in what writes,
when it stops reading and for how long, an urgent byte, whether it ends with a half-close, a reset
or a plain close, and at which byte. Clients and targets are stopped and continued meanwhile. Every
byte that arrives is compared with what stands at its place in its stream.

Now and then the traffic pauses; then only lasting connections may be open. Failures are a wrong
byte, an end that did not arrive as it happened, a hang, a socket left open, private memory that
grows, an additional thread, more log lines than the rate limits allow, and a proxy that spins or
ends.

Samples (samples.csv) and what was counted (result.json) lie in .cache/soak.
Exit status: 0 all held, 1 something did not, 77 this machine cannot run it. Ctrl-C reports what
there is, and ends with 130.
"""

import argparse
import sys
from pathlib import Path

from kit.namespaces import enter_network_for
from soak.soak import Soak

ROOT = Path(__file__).resolve().parents[2]


def options():
    parser = argparse.ArgumentParser(
        prog="ci/test soak --",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--threads", help="--threads= of the proxy `main`")
    parser.add_argument("--rate", type=float, default=1.0, help="of exchanges: 1 is 86 a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/soak")
    parser.add_argument("--executable", type=Path, required=True, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    chosen = options()
    if not enter_network_for("ci/test soak"):
        return 77
    return Soak(chosen).run()


if __name__ == "__main__":
    sys.exit(main())
