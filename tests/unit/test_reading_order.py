"""The relay is read downwards: from a caller to what it calls, from file to file."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "proxyd" / "relay"

FILES = [
    "flows",
    "flow_listener",
    "flow_replies",
    "flow_send",
    "flow_target",
    "flow_held",
    "flow",
    "flow_socket",
    "flow_spare",
    "flow_tell",
    "flow_rights",
    "flow_table",
    "flow_batch",
    "flow_address",
    "flow_types",
    "recover",
    "freeze",
    "workers",
    "loop",
    "recover_entry",
    "restore",
    "accept",
    "connect",
    "sweep",
    "enter",
    "connection",
    "pump",
    "close",
    "balance",
    "gather",
    "quarantine",
    "tidy",
    "pages",
    "page",
    "keep",
    "row",
    "upstream",
    "half",
    "endpoint",
    "slate",
    "parcel",
    "bookkeeping",
    "strike",
    "pipe",
    "position",
    "busy",
    "mailbox",
    "self_connect",
    "binding",
    "sender",
    "source",
    "siphash",
    "rights",
    "gauges",
    "socket",
    "signals",
    "clock",
    "list",
    "types",
    "slate_types",
    "records",
    "sys",
]
"""Each file cimports only from files further down."""

JUMPS_BACK = {}
"""{(caller, callee): why} of the calls that go up in a file."""

LINES_MAX = 400

COMMENT = re.compile(r'"""(?:.|\n)*?"""|#[^\n]*')
CIMPORT = re.compile(r"^from proxyd\.relay\.(\w+) cimport", re.MULTILINE)
FUNCTION = re.compile(r"^cdef inline [^(\n]*?(\w+)\(", re.MULTILINE)


def code(name):
    """The text of a file, without comments."""
    return COMMENT.sub("", (FOLDER / f"{name}.pxd").read_text())


def functions(text):
    """[(name, body)] of a file, in its order."""
    pieces = re.split(r"^(?=cdef inline )", text, flags=re.MULTILINE)[1:]
    return [(FUNCTION.match(piece)[1], piece.partition("(")[2]) for piece in pieces]


def upward_calls(text):
    """{(caller, callee)} of all calls to a function above, or to the caller itself."""
    found, above = set(), []
    for name, body in functions(text):
        above.append(name)
        words = set(re.findall(r"\b\w+\b", body))
        found |= {(name, callee) for callee in above if callee in words}
    return found


def test_every_file_has_its_place():
    assert sorted(FILES) == sorted(
        path.stem for path in FOLDER.glob("*.pxd") if path.stem != "__init__"
    )
    others = {path.name for path in FOLDER.iterdir() if path.suffix != ".pxd"}
    assert others == {"events.pxi", "calls.pxi"}  # what _relay.pyx shows to Python


@pytest.mark.parametrize("name", FILES)
def test_cimports_go_down(name):
    below = FILES[FILES.index(name) + 1 :]
    assert set(CIMPORT.findall(code(name))) - set(below) == set()


@pytest.mark.parametrize("name", FILES)
def test_callers_stand_above_what_they_call(name):
    assert upward_calls(code(name)) - set(JUMPS_BACK) == set()


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_too_long(name):
    assert len((FOLDER / f"{name}.pxd").read_text().splitlines()) <= LINES_MAX


def test_no_exception_is_left_over():
    jumps = set().union(*[upward_calls(code(name)) for name in FILES])
    assert set(JUMPS_BACK) - jumps == set()


def test_a_call_that_goes_up_is_found():
    """So is recursion; a name in a comment is not a call."""
    text = """
cdef inline int lower() noexcept nogil:
    return 1


cdef inline int upper(int count) noexcept nogil:
    # not outer()
    return lower() + upper(count - 1)


cdef inline int outer() noexcept nogil:
    return 0
"""
    assert upward_calls(COMMENT.sub("", text)) == {("upper", "lower"), ("upper", "upper")}
