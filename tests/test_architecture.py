"""Arrows between packages point one way, and what must start fast or run bare imports nothing heavy."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("dsv4/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
HEAVY = {"jax", "flax", "optax", "orbax"}
# Typical GPU images lack these: libraries, kernels and benchmarks must not need them.
TOOLS = {"tyro", "beartype", "torch", "transformers"}

# Turns shape checks on, when asked to; runs the peers' kernels, when pointed to them.
EXCEPT = {"pallas_kernels.typing", "pallas_kernels.bench.peers"}

# package -> what nothing in it may import. The longest matching package decides.
FORBIDDEN = {
    "pallas_kernels": {"dsv4", *TOOLS},
    "pallas_kernels.formats": {"dsv4", *HEAVY, *TOOLS, "pallas_kernels"},
    "dsv4.config": {*HEAVY, *TOOLS, "dsv4.model", "dsv4.training.step", "dsv4.cli"},
    "dsv4.parameters": {*HEAVY, *TOOLS},
    "dsv4.cost": {*HEAVY, *TOOLS},
    "dsv4.model": {*TOOLS, "dsv4.decoding", "dsv4.training", "dsv4.checkpoint", "dsv4.cli"},
    "dsv4.decoding": {*TOOLS, "dsv4.training.run", "dsv4.training.step", "dsv4.checkpoint", "dsv4.cli"},
    "dsv4.checkpoint": {*TOOLS, "dsv4.model", "dsv4.decoding", "dsv4.training", "dsv4.cli"},
    "dsv4.training": {*TOOLS, "dsv4.cli"},
    "dsv4.quantize": {*TOOLS, "dsv4.training", "dsv4.evaluate", "dsv4.cli"},
    "dsv4.evaluate": {*TOOLS, "dsv4.cli"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, but for those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_point_one_way(package):
    wrong = []
    for path in FILES:
        name = module_name(path)
        if name in EXCEPT or not (name == package or name.startswith(package + ".")):
            continue
        for target in imports(path):
            if any(target == bad or target.startswith(bad + ".") for bad in FORBIDDEN[package]):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_references_know_nothing_of_pallas():
    for path in ROOT.glob("pallas_kernels/*/reference.py"):
        assert not any("pallas" in name.split(".") for name in imports(path)), path


def test_files_stay_small():
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > 300}
