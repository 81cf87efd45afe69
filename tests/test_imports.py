"""Imports run one way: a module uses what stands below it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ti_jax"

# From the bottom up; a package stands for all its modules.
ORDER = [
    "startup", "errors", "interrupts", "words", "files", "batches", "config_yaml", "config_checks", "config", "flags",
    "machine", "diffusion", "ops", "models", "weights", "networks", "embeddings", "tokens", "prompt_weights",
    "decoding", "sampling", "text_encoders", "model_description", "pictures", "pipeline", "data", "evaluation",
    "training", "work", "planning", "drawing", "verify", "embedding_commands", "cli",
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
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in types_only:
            continue
        words = (node.module or "").split(".")
        if node.level == depth:
            yield from words if words != [""] else [alias.name for alias in node.names]
        elif node.level == 0 and words[0] == "ti_jax" and len(words) > 1:
            yield words[1]


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
