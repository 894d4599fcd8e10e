"""requirements.txt, setup.cfg and oldest-versions.txt say the same, and name every package that the code imports."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY


# Where the name to install is not the name to import.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "dicebear": "dicebear-core",
    "open_clip": "open_clip_torch",
    "skimage": "scikit-image",
}
THROUGH = {
    "psutil": "accelerate",
    "pandas": "datasets",
    "pyarrow": "datasets",
    "tokenizers": "transformers",
    "yaml": "accelerate",
}  # required by the package named


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_requirements_and_setup_cfg_are_one_list(setup_cfg):
    requirements = lines((REPOSITORY / "requirements.txt").read_text())
    assert requirements[-1] == "-e .[judge,test]"
    assert requirements[:-1] == lines(setup_cfg["options"]["install_requires"])


def test_the_oldest_versions_are_the_lower_bounds(setup_cfg):
    """A bound may only be lowered to what tests/oldest-versions.txt installs, and so to what the tests were run with."""
    extras = setup_cfg["options.extras_require"]
    bounds = [setup_cfg["options"]["install_requires"], *(extras[name] for name in ("judge", "demo", "test"))]
    expected = {line.replace(">=", "==") for text in bounds for line in lines(text) if ">=" in line}
    assert set(lines((REPOSITORY / "tests" / "oldest-versions.txt").read_text())) == expected
    ours = {re.split("[<>=]", line)[0] for line in expected}  # a package has one bound, whichever extra names it
    others = {line.replace(">=", "==") for name in ("fid", "dev") for line in lines(extras[name]) if ">=" in line}
    assert {line for line in others if line.split("==")[0] in ours} <= expected


def test_every_import_is_a_named_requirement(setup_cfg):
    def names(text: str) -> set[str]:
        return {re.split("[<>=]", line)[0].replace("-", "_").lower() for line in lines(text)}

    extras = setup_cfg["options.extras_require"]
    base = names(setup_cfg["options"]["install_requires"]) | names(extras["judge"])
    allowed = {
        "acpo_utils": base | names(extras["pyiqa"]) | names(extras["8bit"]),
        "examples": base,
        "examples/demo": base | names(extras["demo"]),
        "tests": base | names(extras["test"]),
    }
    # The demo's scripts import each other, as scripts of one folder do; tests/conftest.py lets the tests import all scripts.
    demo = {path.stem for path in (REPOSITORY / "examples" / "demo").glob("*.py")}
    scripts = demo | {path.stem for path in (REPOSITORY / "examples").glob("*.py")}
    ours = {"acpo_utils", "tests"}
    unnamed = set()
    for folder in ("acpo_utils", "examples", "tests"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            place = str(file.parent.relative_to(REPOSITORY))
            requirements = allowed.get(place, allowed[folder])
            known = sys.stdlib_module_names | ours
            if folder == "tests":
                known |= scripts
            elif place == "examples/demo":
                known |= demo
            for node in ast.walk(ast.parse(file.read_text())):
                imported = []
                if isinstance(node, ast.Import):
                    imported = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported = [node.module]
                for module in {name.split(".")[0] for name in imported} - known:
                    name = THROUGH.get(module) or DISTRIBUTIONS.get(module, module)
                    if name.replace("-", "_").lower() not in requirements:
                        unnamed.add(f"{file.relative_to(REPOSITORY)}: {module}")
    assert not unnamed


def test_all_of_acpo_utils_is_in_the_package(setup_cfg):
    """Folders with modules are packages, and what is no module is named as package data."""
    package = REPOSITORY / "acpo_utils"
    assert setup_cfg["options"]["packages"] == "find:"
    patterns = lines(setup_cfg["options.package_data"]["acpo_utils"])
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert package / "py.typed" in files
    assert not [path for path in files if path.suffix == ".py" and not (path.parent / "__init__.py").is_file()]
    data = {path.relative_to(package) for path in files if path.suffix != ".py"}
    assert not {path for path in data if not any(path in package_data(package, pattern) for pattern in patterns)}
    assert all(package_data(package, pattern) for pattern in patterns), "a pattern that matches nothing"


def package_data(package: Path, pattern: str) -> set[Path]:
    return {path.relative_to(package) for path in package.glob(pattern)}


@pytest.mark.parametrize("name", ["main", "test"])
def test_readme_marks_the_commands_that_ci_runs(name):
    match = re.search(
        rf"^<!-- ci: {name} -->\n+```bash\n(.+?)\n```$", (REPOSITORY / "README.md").read_text(), re.M | re.S
    )
    assert match, f"README.md: no code block after <!-- ci: {name} -->"
    assert "\n" not in match[1].replace("\\\n", "")  # .ci/run appends flags to it: one command
