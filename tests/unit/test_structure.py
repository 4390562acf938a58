"""The modules of the program: no import circle, no long file, and callers above callees."""

import ast
from pathlib import Path

import pytest

import proxyd

FOLDER = Path(proxyd.__file__).parent
FILES = sorted(
    [*FOLDER.glob("*.py"), *FOLDER.glob("continuity/*.py"), *FOLDER.glob("inspection/*.py")]
)
"""`proxyd.units` is another program."""


def name_of(path):
    """The name of a module, without that of the package."""
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)


COMPANION = sorted(FOLDER.glob("ctl/*.py"))
"""Of `socket-proxyctl`."""

MODULES = {name_of(path): ast.parse(path.read_text()) for path in FILES}

LINES_MAX = 400

LONG = {}
"""Module → why it may be longer."""

OUT_OF_ORDER = {}
"""(module, function or Class.method) → why it stands above its first caller."""


def imports(tree):
    """The modules of the program that `tree` imports anywhere, even for the type checker only."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("proxyd.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "proxyd":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.removeprefix("proxyd."))
    return found & MODULES.keys()


def circle(graph):
    """A circle of imports, as a list of modules; empty if there is none."""
    done = set()

    def visit(module, path):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    for module in graph:
        if found := visit(module, []):
            return found
    return []


def functions(tree):
    """{(class or None, name): node} of all functions and methods."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[None, node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {(node.name, one.name): one for one in node.body if is_function(one)}
    return found


def is_function(node):
    return isinstance(node, ast.FunctionDef)


def uses(owner, function):
    """What the body of a function refers to, as keys of functions()."""
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                yield None, node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield owner if node.value.id in ("self", "cls") else node.value.id, node.attr


def out_of_order(tree):
    """The functions and methods that stand above their first caller."""
    defined = functions(tree)
    first_caller = {}
    for (owner, name), function in defined.items():
        for used in uses(owner, function):
            if used in defined and used != (owner, name):
                line = first_caller.get(used, function.lineno)
                first_caller[used] = min(line, function.lineno)
    early = [used for used, line in first_caller.items() if defined[used].lineno < line]
    return {f"{owner}.{name}" if owner else name for owner, name in early}


def test_there_is_no_import_circle():
    graph = {module: imports(tree) for module, tree in MODULES.items()}
    assert circle(graph) == []
    assert "relay" not in graph
    assert {"acceptor", "options"} <= graph["server"] | graph["cli"]  # the graph is not empty


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", FILES + COMPANION, ids=name_of)
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert (lines > LINES_MAX) == (name_of(path) in LONG), f"{path.name} has {lines} lines"


@pytest.mark.parametrize("module", MODULES)
def test_callers_stand_above_callees(module):
    excused = {name for where, name in OUT_OF_ORDER if where == module}
    assert out_of_order(MODULES[module]) == excused


@pytest.mark.parametrize("path", COMPANION, ids=lambda path: path.stem)
def test_callers_stand_above_callees_in_socket_proxyctl(path):
    assert out_of_order(ast.parse(path.read_text())) == set()


def test_the_program_imports_nothing_of_socket_proxyctl():
    imported = [
        name
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (name := node.module or "").startswith("proxyd.ctl")
    ]
    assert imported == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(): g()\ndef g(): pass", set()),
        ("def g(): pass\ndef f(): g()", {"g"}),
        ("def g(): g()\nTABLE = (g,)", set()),
        ("def f(): g()\ndef g(): pass\ndef h(): g()", set()),
        ("class A:\n  def f(self): self.g()\n  def g(self): pass", set()),
        ("class A:\n  def g(self): pass\n  def f(self): x(lambda: self.g)", {"A.g"}),
        ("class A:\n  def g(self): pass\nclass B:\n  def f(self): self.g()", set()),
    ],
)
def test_a_wrong_order_is_found(source, found):
    assert out_of_order(ast.parse(source)) == found
