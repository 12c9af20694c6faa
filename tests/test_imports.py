"""The modules and imports of the code are those of the picture in docs/contributing.md."""

import ast
import re
from graphlib import TopologicalSorter

from conftest import ROOT


def rows():
    """Return the modules of each row of the picture, top first."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    picture = re.search(r"```text\n(scripts .*?)```", page, re.DOTALL)[1]
    rows = []
    for line in picture.splitlines():
        if not line.startswith(" "):
            rows.append([])
        rows[-1] += line[11:].split()
    return rows


def module_files():
    """Return the file of each module by its dotted name."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("toolkit/**/*.py"), *ROOT.glob("tools/*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in paths
        if path.name != "__init__.py"
    }


def imported(path, modules):
    """Return the modules of the toolkit that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & modules


def test_the_picture_shows_every_module():
    shown = [module for row in rows() for module in row]
    assert sorted(shown) == sorted(module_files())


def test_imports_go_down_and_never_in_a_circle():
    files = module_files()
    row_of = {module: number for number, row in enumerate(rows()) for module in row}
    graph = {module: imported(path, files.keys()) for module, path in files.items()}
    for module, imports in graph.items():
        for other in imports:
            assert row_of[other] >= row_of[module], f"{module} imports {other}, from a row above"
    scripts = set(rows()[0])
    assert not [(m, s) for m, imports in graph.items() for s in imports & scripts]
    list(TopologicalSorter(graph).static_order())  # raises CycleError
