"""Send mixed traffic through the installed command for a long time: its use of memory must be flat.

    ci/test --quick soak                       two minutes, as in continuous integration
    ci/test soak -- --minutes 60
    ci/bench chart .cache/soak FILE.svg        draw the run: doc/reports/soak.svg is one of an hour

Eight proxies run at once, in a network of their own:

    main     TCP, IPv6 and UNIX in every combination. Its targets stay up, so nothing may be lost.
             It also forwards one stream of 200 GB an hour, and connections of one byte a second
    header   --proxy-protocol=v2; the header is compared with the client's address
    idle     --idle-timeout=3s; some readers stall for longer, and some connections are silent
    few      80 open files, often fewer: accept, socket and pipe2 fail
    shaky    the targets are killed or exit, and come back
    new      restarted and reloaded all the time; as with main, nothing may be lost
    killed   killed all the time: no old connection may be lost, and young ones only be reset
    flows    datagrams over UDP and UNIX sockets, to targets of both sorts, with a stream

Each exchange follows a random plan that both ends know: how many bytes each side sends and in
writes of which size, when it stops reading and for how long, whether it sends an urgent byte, and
whether it ends with a half-close, a reset or a plain close, and after which byte. Meanwhile,
clients and targets are stopped and continued. Every byte that arrives is compared with the one that
belongs at its offset in the stream. Datagrams are numbered: they may be lost, but each that arrives
must be whole, come from where its question went, and come once and in order.

Now and then the traffic pauses; then only lasting connections may be open. A run fails if there is
a wrong byte, an end that arrives as another kind of end, a hang, a socket left open, private memory
that grows, an additional thread, more log lines than the rate limits allow, or a proxy that spins
or exits.

Samples (samples.csv) and counts (result.json) are left in .cache/soak.
Exit status: 0 all passed, 1 something failed, 77 this machine cannot run it. Ctrl-C reports the
results so far, and exits with 130.
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
    parser.add_argument("--rate", type=float, default=1.0, help="of exchanges: 1 means 86 a second")
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
