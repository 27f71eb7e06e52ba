"""Imports go one way, files stay small."""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from burnish import PUBLIC

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "burnish"
TECHNIQUES = ("tune", "compress", "context", "place")
LAYERS = (  # a module may import its own layer and those below
    ("cli", "__main__"),
    ("serve",),
    ("bench",),
    ("prompt",),
    ("engine",),
    ("plan",),
    ("store",),
    ("chain",),
    TECHNIQUES,
    ("kernels",),
    ("model",),
    ("native",),
    ("config", "device"),
    ("world",),
    ("__init__",),
)
COMPOSITIONS = {"burnish.tune.qlora"}  # techniques declared as made of others
MOST_LINES, MOST_CODE_LINES = 400, 18_500  # the world, data in the form of code, is not counted


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    top = module.split(".")[1] if "." in module else "__init__"
    found = [index for index, names in enumerate(LAYERS) if top in names]
    assert found, f"{module}: give burnish/{top} a place in LAYERS"
    return found[0]


def is_technique(module: str) -> bool:
    """A file of the technique folders with a `Config` and an `apply`; a helper there has neither."""
    if module not in MODULES or module.split(".")[1:2] not in [[name] for name in TECHNIQUES]:
        return False
    return {"Config", "apply"} <= {getattr(node, "name", "") for node in syntax(module).body}


@cache
def syntax(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, but for imports that serve annotations only: they are no dependency."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from nodes(child)


def imports(module: str) -> set[str]:
    """The modules of burnish that `module` imports, at its top or inside a function."""
    found = set()
    for node in nodes(syntax(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: line {node.lineno}: write imports in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                public = PUBLIC.get(alias.name) if node.module == "burnish" else None
                found.add(public or (inner if inner in MODULES else str(node.module)))
    return {name for name in found if name.split(".")[0] == "burnish"}


def wrong_arrow(module: str, target: str) -> str | None:
    """Why `module` may not import `target`; None if it may."""
    if module.startswith("burnish.world") and not target.startswith("burnish.world"):
        return "world imports nothing of burnish"
    if layer(target) < layer(module):
        return f"{LAYERS[layer(target)]} is above {LAYERS[layer(module)]}"
    sibling = target != module and is_technique(module) and is_technique(target)
    return "a technique imports no sibling" if sibling and module not in COMPOSITIONS else None


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    wrong = {target: reason for target in imports(module) if (reason := wrong_arrow(module, target))}
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("burnish.model.linear", "burnish.kernels"),
        ("burnish.tune.lora", "burnish.engine"),
        ("burnish.tune.lora", "burnish.chain"),
        ("burnish.world.facts", "burnish.config"),
        ("burnish.config", "burnish.cli"),
        ("burnish.device", "burnish.model"),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, target: str) -> None:
    assert wrong_arrow(module, target)


def test_imports_inside_functions_and_of_public_names_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from burnish.chain import Model\n"
        "def f():\n    from burnish import load, __version__\n    from burnish import device\n"
        "    import burnish.config, torch\n"
    )
    monkeypatch.setitem(MODULES, "burnish.tune.x", path)
    assert imports("burnish.tune.x") == {PUBLIC["load"], "burnish", "burnish.device", "burnish.config"}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def code_lines(path: Path) -> int:
    """Lines with code on them: blank ones, comments and docstrings cost a reader nothing."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found, fresh = set(), True
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.ENCODING, *skipped):
                fresh = fresh or token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            elif not (fresh and token.type == tokenize.STRING):
                found |= set(range(token.start[0], token.end[0] + 1))
                fresh = False
    return len(found)


def test_files_and_the_package_stay_small() -> None:
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    assert not {str(path): lines(path) for path in files if lines(path) > MOST_LINES}
    counted = [path for name, path in MODULES.items() if not name.startswith("burnish.world")]
    assert sum(map(code_lines, counted)) < MOST_CODE_LINES
