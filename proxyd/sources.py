"""One client's share of the limit (--connections-max-per-source=).

The relay counts and refuses. This module sets it up, and says to whom the limit does not apply; it
is imported only if there is one.
"""

from proxyd import log
from proxyd.acceptor import Acceptor
from proxyd.address import AF_UNIX
from proxyd.listen import list_names
from proxyd.user_namespace import has_all_users, overflow_uid

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.datagrams import DatagramPolicy


def limit_sources(acceptor: Acceptor, datagrams: "DatagramPolicy | None", places_max: int) -> None:
    """Let each source have `places_max` connections, and as many flows. Raises OSError.

    A user without a name in our user namespace cannot be told from others, and one of them could
    lock all others out.
    """
    unix = [one for one in acceptor.listeners if one.family == AF_UNIX]
    unknown_uid = -1
    if any(not one.datagram for one in unix) and not has_all_users():
        unknown_uid = overflow_uid()
        log.warning(
            "--connections-max-per-source= does not apply to UNIX clients of users that are not "
            f"known here, as with PrivateUsers=: all of them have the uid {unknown_uid}."
        )
    if names := [one.text for one in unix if one.datagram]:
        log.warning(
            "--connections-max-per-source= does not apply to UNIX datagrams, which do not tell "
            f"their user: {list_names(names)}."
        )
    acceptor.limit_sources(places_max, unknown_uid)
    if datagrams is not None:
        datagrams.relay_part.limit_sources(places_max)
