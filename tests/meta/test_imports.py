"""Who may import whom: a module imports only those that come earlier in this list."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).parents[2] / "puna"

ORDER = [
    "errors",
    "machine",
    "rope",
    "config",
    "layout_rules",
    "samplers",
    "backend",
    "quantization",
    "layers",
    "text",
    "checkpoint",
    "distribution",
    "decoding",
    "tuning",
    "models",
    "chat",
    "runs",
    "testing",
    "cli",
    "launch",
    "__main__",
]

# Only these may name a backend's library; everything else goes through keras.ops.
BACKEND_LIBRARIES = {"jax", "jaxlib", "torch", "tensorflow"}


def _imports(path: Path) -> set[str]:
    """Modules that a file imports at run time, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _part(module: str) -> str:
    return module.split(".")[1]


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_earlier_ones(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in ORDER, f"add {own} to ORDER"
    theirs = {_part(name) for name in _imports(path) if name.startswith("puna.")}
    later = {part for part in theirs if ORDER.index(part) > ORDER.index(own)}
    assert not later, f"{own} imports {sorted(later)}, which come after it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_backend_libraries_are_named_in_one_place(path):
    if ROOT / "backend" in path.parents:
        return
    used = {name.split(".")[0] for name in _imports(path)} & BACKEND_LIBRARIES
    assert not used, f"{path.name} imports {sorted(used)}; only puna/backend may"


def test_text_needs_no_keras():
    for path in (ROOT / "text").rglob("*.py"):
        assert not any(name.split(".")[0] == "keras" for name in _imports(path)), path.name
