"""The user namespace of this process, in which some users may have no name."""

DEFAULT_OVERFLOW_UID = 65534
"""What the kernel is built with."""

_ALL_UIDS = 2**32 - 1


def overflow_uid() -> int:
    """Return the uid as which all users appear that have no name here."""
    try:
        with open("/proc/sys/kernel/overflowuid", "rb") as file:
            return int(file.read(16))
    except (OSError, ValueError):  # ProcSubset=pid hides it
        return DEFAULT_OVERFLOW_UID


def has_all_users() -> bool:
    """Tell whether every user of the machine has a name here."""
    try:
        with open("/proc/self/uid_map", "rb") as file:
            return sum(int(line.split()[2]) for line in file.read().splitlines()) >= _ALL_UIDS
    except FileNotFoundError:
        return True  # a kernel without user namespaces
    except (OSError, ValueError, IndexError):
        return False
