"""Make the bundle that the command loads at its start: make_bundle.py FOLDER.

FOLDER is that of the built package. proxyd/__init__.py loads the bundle. Run as a program of its
own, by setup.py: what marshal writes depends on what else the interpreter has loaded.
"""

import ast
import marshal
import sys
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from types import CodeType

# What every start needs. A module stands below those that it imports.
MODULES = (
    "os_text",
    "address",
    "threads",
    "log",
    "errors",
    "target",
    "listen",
    "activation",
    "options",
    "command_line",
    "peers",
    "cli",
    "limits",
    "event_loop",
    "loop_guard",
    "connect_errors",
    "happy_eyeballs",
    "held",
    "outage",
    "upstream",
    "refusals",
    "acceptor",
    "routes",
    "sd_notify",
    "sizes",
    "stats",
    "succession",
    "server",
)


def main(folder: Path) -> None:
    """Make the bundle of the package in `folder`."""
    modules = tuple((name, code_of(folder / f"{name}.py")) for name in MODULES)
    path = folder / f"start.{sys.implementation.cache_tag}.bundle"
    path.write_bytes(MAGIC_NUMBER + marshal.dumps(modules))


def code_of(source: Path) -> CodeType:
    """Compile a module; its file has no folder, since where that will be is not known yet."""
    tree = Lean().visit(ast.parse(source.read_bytes()))
    return compile(tree, source.name, "exec", dont_inherit=True, optimize=0)


class Lean(ast.NodeTransformer):
    """Removes docstrings and annotations, which nothing looks at; every line stays in its place."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:  # noqa: D102
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.copy_location(ast.Pass(), node) if is_text else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: D102
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:  # noqa: D102
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:  # noqa: D102
        plain = ast.Assign([node.target], node.value) if node.value else ast.Pass()
        return ast.fix_missing_locations(ast.copy_location(plain, node))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
