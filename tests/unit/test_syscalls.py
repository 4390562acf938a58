"""doc/SYSCALLS.md says for every system call why it cannot wait."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

DECLARED = re.compile(r"^    (?:[\w ]+[ *]+)(\w+)\((?!\*)", re.MULTILINE)


def test_every_call_of_the_extension_is_in_the_table():
    declarations = (ROOT / "proxyd" / "relay" / "sys.pxd").read_text()
    declarations = re.sub(r'""".*?"""', "", declarations, flags=re.DOTALL)
    declared = {name for name in DECLARED.findall(declarations) if name != "noexcept"}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "doc" / "SYSCALLS.md").read_text(), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {"accept4", "splice", "close"} <= declared
    assert declared - explained == set()
    assert explained - declared - {"log", "notify"} == set()
