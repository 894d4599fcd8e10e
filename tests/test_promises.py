"""What the project promises of its own files: short scripts, the step first, the equations named, no dead flag."""

import ast
import re

import pytest

from tests import REPOSITORY


SCRIPTS = sorted((REPOSITORY / "examples").glob("*.py"))
TRAINING_SCRIPTS = [path for path in SCRIPTS if path.name.startswith("train_")]
ACPO_SCRIPTS = [path for path in TRAINING_SCRIPTS if path.name.startswith("train_acpo_")]
UTILS = sorted((REPOSITORY / "acpo_utils").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_stand_alone(path):
    source = path.read_text()
    assert len(source.splitlines()) < 600
    siblings = {script.stem for script in SCRIPTS}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] not in siblings | {"examples"}


@pytest.mark.parametrize("path", TRAINING_SCRIPTS, ids=lambda path: path.name)
def test_the_training_step_comes_first(path):
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert functions[0].name == "training_step" and functions[0].lineno < 80


@pytest.mark.parametrize("path", UTILS, ids=lambda path: str(path.relative_to(REPOSITORY / "acpo_utils")))
def test_utils_are_short_parse_nothing_and_do_not_look_up(path):
    source = path.read_text()
    assert len(source.splitlines()) < 300
    assert "argparse" not in source and "from examples" not in source


@pytest.mark.parametrize("path", ACPO_SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("equation", [5, 6, 7, 8, 9])
def test_each_equation_is_named_at_its_line(equation, path):
    pattern = re.compile(rf"eqs?\. (\d, )*{equation}\b")
    script = path.read_text()
    step = script[script.index("def training_step") : script.index("\n\n\n", script.index("def training_step"))]
    assert pattern.search(step), "not in the script's training step"
    assert any(pattern.search(path.read_text()) for path in UTILS), "not in acpo_utils"


@pytest.mark.parametrize("path", ACPO_SCRIPTS, ids=lambda path: path.name)
def test_the_step_reads_as_equations_5_to_9_in_order(path):
    script = path.read_text()
    step = script[script.index('"""L = L_diff') + 80 : script.index("\n\n\n", script.index("def training_step"))]
    named = [int(number) for number in re.findall(r"\(eq\. (\d)\)", step)]
    assert named == sorted(named) and set(named) >= {5, 6, 7, 8, 9}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_parsed_flag_is_read(path):
    source = path.read_text()
    flags = re.findall(r'add(?:_argument)?\(\s*"--(\w+)"', source)
    assert flags or "argparse" not in source
    if "start_run(args" in source:  # and hands its arguments on
        source += "".join(path.read_text() for path in UTILS if path.parent.name in ("training", "ratings"))
    unread = [flag for flag in flags if not re.search(rf"\bargs\.{flag}\b", source)]
    assert not unread, f"parsed and never read: {unread}"
