"""Compare the files of DEB and RPM: what only one of them has is named here, with the reason.

Usage: same_files.py DEB-FILES RPM-FILES        (one path a line; folders are not looked at)
"""

import re
import sys
from pathlib import Path

COMMON = {
    # Private in the DEB; where Python looks anyway in the RPM, as Fedora has it.
    "/usr/lib/systemd-socket-proxyd/proxyd/": "modules/",
    "/usr/lib/python3/dist-packages/proxyd/": "modules/",
    # Where the zsh of each looks.
    "/usr/share/zsh/vendor-completions/": "zsh/",
    "/usr/share/zsh/site-functions/": "zsh/",
}

ONLY_DEB = {
    r"/usr/share/doc/\S+/copyright": "Debian's form of the license",
    r"/usr/share/doc/\S+/changelog\.Debian": "the package's own changelog, inside the RPM's header",
    r"/usr/share/doc/\S+/changelog": "CHANGELOG.md under Debian's name",
    r"/usr/share/python3/runtime\.d/\S+": "compiles the modules when the interpreter changes",
    r"/usr/share/lintian/overrides/\S+": "for lintian",
}
ONLY_RPM = {
    r"\S+/proxyd-?\S*\.pyc|modules/(?:\w+/)?__pycache__/\S+": (
        "compiled here, and by the DEB when installed"
    ),
    r"\S+\.dist-info/\S+": "for importing the modules: those of the DEB are private",
    r"/usr/lib/\.build-id/\S+": "how debuggers find the symbols; Debian's look elsewhere",
    r"/usr/share/doc/\S+/CHANGELOG\.md": "under Debian's name in the DEB",
}


def files(listing: str) -> set[str]:
    """What is installed, under names that both packages have."""
    found = set()
    for line in listing.splitlines():
        if not line.endswith("/"):
            name = line.removesuffix(".gz")
            for where, common in COMMON.items():
                name = name.replace(where, common)
            found.add(name)
    return found


def unexplained(names: set[str], reasons: dict[str, str], package: str) -> list[str]:
    """Files that no reason covers, and reasons that cover no file."""
    faults = [
        f"only the {package} has {name}"
        for name in sorted(names)
        if not any(re.fullmatch(pattern, name) for pattern in reasons)
    ]
    return faults + [
        f"the {package} has nothing like {pattern}: the reason '{reason}' can go"
        for pattern, reason in reasons.items()
        if not any(re.fullmatch(pattern, name) for name in names)
    ]


def main() -> int:
    deb, rpm = (files(Path(name).read_text()) for name in sys.argv[1:])
    faults = unexplained(deb - rpm, ONLY_DEB, "DEB") + unexplained(rpm - deb, ONLY_RPM, "RPM")
    for fault in faults:
        print(fault)
    if not faults:
        print(f"ok {len(deb & rpm)} files in DEB and RPM, {len(deb ^ rpm)} in one for a reason")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
