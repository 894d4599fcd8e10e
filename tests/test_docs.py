"""What the documentation names is there: links, pictures, files, modules, and the flags of its commands."""

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tests import REPOSITORY


PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").glob("*.md"),
        *(REPOSITORY / "examples").rglob("*.md"),
    ]
)
SOURCES = sorted([*(REPOSITORY / "acpo_utils").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.py")])
SCRIPTS = sorted((REPOSITORY / "examples").rglob("*.py"))
# What a changelog names may be gone.
PRESENT = [path for path in PAGES if path.name != "CHANGELOG.md"]
# Flags in running text that are no script's of ours: of accelerate, pip, diffusers' scripts, and the forms of a flag.
OTHERS = {"--cpu", "--num_processes", "--no-deps", "--flag"}


def place(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


every_page = pytest.mark.parametrize("path", PRESENT, ids=place)
every_file = pytest.mark.parametrize("path", [*PRESENT, *SOURCES], ids=place)


def without_code(text: str) -> str:
    """A page without its code blocks: there a `#` is no heading and a bracket no link."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page: lower case, no punctuation, a hyphen for each space."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-"))
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """Links and pictures of `text`, as a page at `page`, whose file or heading does not exist; web addresses aside."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        target, _, heading = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target) if target else page
        missing = not file.exists()
        if not missing and heading:
            missing = heading not in anchors(text if file == page else file.read_text())
        if missing:
            broken.append(link)
    return broken


def missing_files(text: str) -> list[str]:
    """Files of the repository that `text` names by their path from its root, and that are not there."""
    names = re.findall(
        r"(?<![\w./-])(?:acpo_utils|docs|examples|tests)/[\w./-]*\w\.(?:py|md|json|yaml|png|txt)\b", text
    )
    return sorted({name for name in names if not (REPOSITORY / name).exists()})


def exists(name: str) -> bool:
    """Whether `name`, such as acpo_utils.losses.quality_loss, can be imported: modules, then what they hold."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def named_modules(text: str) -> set[str]:
    """Names in acpo_utils: in prose, and imported by the Python blocks of a page."""
    names = set(re.findall(r"\bacpo_utils(?:\.[A-Za-z]\w*)+", text))
    for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "acpo_utils":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def flags_of(script: Path) -> set[str]:
    """The flags that a script's parser has, read from its source."""
    flags = {"--help"}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call):
            words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            own = {word for word in words if isinstance(word, str) and re.fullmatch(r"--[a-z]\w*", word)}
            if any(ast.unparse(keyword.value).endswith("BooleanOptionalAction") for keyword in node.keywords):
                own |= {f"--no-{word.removeprefix('--')}" for word in own}
            flags |= own
    return flags


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks of a page, or in the indented lines of a docstring."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}\S.*\n?)(?:^ {5,}\S.*\n?)*", text, flags=re.MULTILINE) if "```" not in text else []
    found = []
    for block in blocks:
        for line in re.sub(r"\\+\n", " ", block).splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:  # prose with an apostrophe
                continue
            command = []
            for word in [*words, ";"]:
                if re.fullmatch("[&|;]+", word):
                    found.append(command)
                    command = []
                else:
                    command.append(word)
    return [command for command in found if command]


def unknown_flags(words: list[str]) -> list[str]:
    """Of a command that runs a script of ours, "SCRIPT FLAG" for each flag that this script has not.

    run_ablations.py hands what is after `--`, and what is in a --variant, to the script that it runs, and rival_methods.py
    what is not its own.
    """
    position = next((n for n, word in enumerate(words) if re.fullmatch(r"(\S*/)?examples/\S+\.py", word)), None)
    if position is None:
        return []
    script, flags = REPOSITORY / words[position], words[position + 1 :]
    if not script.is_file():
        return [f"{words[position]} does not exist"]
    rest = []
    if script.name == "run_ablations.py":
        rest = [text.partition(":")[2] for flag, text in zip(flags, flags[1:]) if flag == "--variant"]
        if "--" in flags:
            flags, passed = flags[: flags.index("--")], flags[flags.index("--") + 1 :]
            rest += passed
        rest = " ".join(rest).split()
    known = flags_of(script)
    if script.name == "rival_methods.py":
        known = known | flags_of(REPOSITORY / "examples" / "train_acpo_lora_sd.py")
    unknown = [flag for flag in flag_names(flags) if flag not in known]
    runs = [REPOSITORY / "examples" / name for name in ("train_acpo_lora_sd.py", "train_acpo_ddpm.py")]
    if "--script" in flags:
        runs = [REPOSITORY / flags[flags.index("--script") + 1]]
    unknown += [flag for flag in flag_names(rest) if not any(flag in flags_of(run) for run in runs)]
    return [f"{script.name} {flag}" for flag in unknown]


def flag_names(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


def unknown_flags_in_prose(text: str) -> list[str]:
    """Flags in running text that no script of ours has."""
    known = OTHERS.union(*map(flags_of, SCRIPTS))
    words = re.findall(r"(?<![\w-])--[a-z][\w-]*", without_code(text))
    return sorted(set(words) - known)


@pytest.mark.parametrize("path", PAGES, ids=place)
def test_links_lead_somewhere(path):
    assert not broken_links(path, path.read_text())


@every_file
def test_files_that_are_named_exist(path):
    assert not missing_files(path.read_text())


@every_file
def test_names_of_acpo_utils_can_be_imported(path):
    assert not [name for name in sorted(named_modules(path.read_text())) if not exists(name)]


@every_page
def test_documented_commands_have_flags_that_exist(path):
    text = path.read_text()
    assert not [unknown for command in commands(text) for unknown in unknown_flags(command)]
    assert not unknown_flags_in_prose(text)


@pytest.mark.parametrize("path", SCRIPTS, ids=place)
def test_commands_in_docstrings_have_flags_that_exist(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert not [unknown for command in commands(docstring) for unknown in unknown_flags(command)]


def test_every_page_of_docs_is_in_the_index():
    index = (REPOSITORY / "docs" / "README.md").read_text()
    pages = {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w[\w-]*\.md)\)", index))


def test_what_is_wrong_is_found():
    page = REPOSITORY / "docs" / "method.md"
    text = "# A (b), c\n[x](method.md) [x](#a-b-c) ![x](none.png) [x](method.md#none) [x](#none) [x](https://a.b)\n"
    assert broken_links(page, text) == ["none.png", "method.md#none", "#none"]
    assert not broken_links(page, "```\n[x](none.md)\n```\n")
    assert missing_files("`tests/test_docs.py`, docs/none.md, examples/demo/none.json") == [
        "docs/none.md",
        "examples/demo/none.json",
    ]
    assert exists("acpo_utils.losses.quality_loss") and exists("acpo_utils.evaluators.ipce.IPCE.similarities")
    for name in ("acpo_utils.none", "acpo_utils.losses.none", "acpo_utils.evaluators.ipce.IPCE.none"):
        assert not exists(name)
    block = "```python\nfrom acpo_utils.losses import none\n```\n"
    assert named_modules(block) == {"acpo_utils.losses", "acpo_utils.losses.none"}

    text = "```bash\npip install x && accelerate launch examples/train_acpo_ddpm.py --tmax 1 \\\n    --none 2 | tee --append\n```"
    assert [unknown_flags(command) for command in commands(text)] == [[], ["train_acpo_ddpm.py --none"], []]
    assert unknown_flags(["python", "examples/none.py"]) == ["examples/none.py does not exist"]
    variant = ["examples/run_ablations.py", "--grid", "tmax=1", "--variant", "a: --none 1", "--", "--seed", "--other"]
    assert unknown_flags(variant) == ["run_ablations.py --none", "run_ablations.py --other"]
    assert commands("Text.\n\n    python examples/x.py --a \\\n        --b\n\nText.") == [
        ["python", "examples/x.py", "--a", "--b"]
    ]
    assert unknown_flags_in_prose("`--tmax 1`, `--none`, a -- dash") == ["--none"]
