"""Which part of acpo_utils may import which: a reader, and whoever copies one part, can hold one rule of direction."""

import ast
from pathlib import Path

import pytest

from tests import REPOSITORY


PACKAGE = REPOSITORY / "acpo_utils"
# From the ground up. A module imports from lower layers, or from its own folder.
LAYERS = [
    {"losses", "anchor", "randomness", "files", "statistics", "sharding"},
    {"late_step", "flow_matching", "families", "lora", "checkpoints", "data", "evaluators", "ablations"},
    {"ratings", "evaluation", "ddpm"},
    {"training"},
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported_modules(source: str) -> set[str]:
    """Full names of what a module imports, those inside of functions too."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def part_of(path: Path) -> str:
    """The first name below acpo_utils: a file's or a folder's."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def wrong_imports(part: str, source: str) -> list[str]:
    """What a module of `part` imports against the rule."""
    wrong = []
    for module in sorted(imported_modules(source)):
        package, _, rest = module.partition(".")
        if package in ("examples", "tests"):
            wrong.append(module)
        if package != "acpo_utils":
            continue
        other = rest.split(".")[0]
        if other != part and not HEIGHT.get(other, len(LAYERS)) < HEIGHT[part]:
            wrong.append(module)
    return wrong


def test_every_part_has_its_layer_and_they_are_few():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= 20
    assert {entry.removesuffix(".py") for entry in entries} - {"__init__", "py.typed"} == set(HEIGHT)


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) != "__init__"], ids=name)
def test_a_module_imports_from_lower_layers_or_its_own_folder(path):
    assert not wrong_imports(part_of(path), path.read_text())


def test_the_package_itself_imports_none_of_its_parts():
    modules = imported_modules((PACKAGE / "__init__.py").read_text())
    assert not {module for module in modules if module.startswith("acpo_utils")}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) < 300


def test_the_rule_finds_what_it_is_for():
    assert wrong_imports("losses", "from acpo_utils.anchor import base_prediction") == [
        "acpo_utils.anchor.base_prediction"
    ]
    assert wrong_imports("lora", "def f():\n    from acpo_utils.training import run") == ["acpo_utils.training.run"]
    assert wrong_imports("training", "import examples.train_acpo_ddpm") == ["examples.train_acpo_ddpm"]
    assert wrong_imports("files", "from acpo_utils import nothing_known") == ["acpo_utils.nothing_known"]
    assert not wrong_imports(
        "data", "import torch\nfrom acpo_utils import files\nfrom acpo_utils.data.prompts import x"
    )
    with pytest.raises(AssertionError, match="line 2: imports are absolute"):
        wrong_imports("data", "import torch\nfrom .prompts import x")
