"""Imports of prunekit/ point down only, those inside of functions, too; what plans does so without torch."""

import ast

import pytest
from helpers.paths import ROOT

LIBRARY = ROOT / "prunekit"
ORDER = (  # from below; names on one line know nothing of each other, and what is not here is a command, above all
    ("errors",), ("rules", "arguments"), ("gates", "families"), ("msswift",), ("checkpoint",), ("model",), ("data",),
    ("surgery",), ("report",), ("knockout", "training", "tagger"), ("serving", "loop"),
)  # fmt: skip
RANK = {name: number for number, names in enumerate(ORDER) for name in names}
WINGS = {path.stem for path in LIBRARY.iterdir()}
WITHOUT_TORCH = [LIBRARY / "families.py", *(LIBRARY / "checkpoint").glob("*.py"), *(LIBRARY / "msswift").glob("*.py")]
PLANS = (
    "layers",
    "kv",
    "width",
    "width_parts",
    "experts",
    "vocabulary",
    "vocabulary_files",
    "zeros",
    "zeros_files",
    "zeros_weights",
    "zeros_wish",
)
WITHOUT_TORCH += [*(LIBRARY / "loop").glob("*.py"), LIBRARY / "plan.py"]
WITHOUT_TORCH += [LIBRARY / "surgery" / f"{plan}.py" for plan in PLANS]


def imported(nodes) -> set[str]:
    """The modules that import statements name, in full; relative ones stay within a wing and are left out."""
    named = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
    return named


def test_imports_point_down():
    found = set()
    for file in LIBRARY.rglob("*.py"):
        own = file.relative_to(LIBRARY).parts[0].removesuffix(".py")
        for name in imported(ast.walk(ast.parse(file.read_text()))):
            package, _, rest = name.partition(".")
            wing = rest.partition(".")[0]
            below = RANK.get(wing, len(ORDER)) < RANK.get(own, len(ORDER) + 1)
            if package == "prunekit" and wing in WINGS - {own} and not below:
                found.add(f"{file.relative_to(LIBRARY)}: {wing}")
    assert found == set()


@pytest.mark.parametrize("file", WITHOUT_TORCH, ids=lambda file: str(file.relative_to(LIBRARY)))
def test_what_plans_imports_no_torch(file):
    assert not {name for name in imported(ast.parse(file.read_text()).body) if name.split(".")[0] == "torch"}
