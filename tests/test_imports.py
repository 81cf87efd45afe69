"""Imports run one way: a module uses what stands below it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ti_jax"

# From the bottom up; a package stands for all its modules.
ORDER = [
    "errors", "startup", "interrupts", "words", "files", "cache", "remote", "batches", "machine", "images", "config",
    "ops", "diffusion", "models", "weights", "embeddings", "text", "pipeline", "data", "evaluation", "training", "ui",
    "cli",
]  # fmt: skip


def layer(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Layers that a module imports, at its top or inside a function; what only types need does not count."""
    tree = ast.parse(path.read_text())
    types_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in types_only:
            assert node.level == 0, f"{path}: imports within the package are absolute"
            package, *words = (node.module or "").split(".")
            if package == "ti_jax":
                yield from words[:1] or [alias.name for alias in node.names]


def test_imports_run_one_way():
    modules = [path for path in PACKAGE.rglob("*.py") if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")]
    seen = 0
    for path in modules:
        own = layer(path)
        assert own in ORDER, f"{path}: where does it stand?"
        for other in imported(path):
            if other in ORDER and other != own:
                seen += 1
                assert ORDER.index(other) < ORDER.index(own), f"{path.relative_to(PACKAGE)} imports {other}, above it"
    assert seen > 50
