"""How the scripts read: nothing packed to pass the limit of 600 lines, nothing built only to be splatted into one call."""

import ast
import io
import tokenize
from functools import cache

import pytest

from tests import REPOSITORY


SCRIPTS = sorted((REPOSITORY / "examples").glob("*.py"))
NO_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# From Python 3.12 on an f-string is several tokens.
FSTRING_START, FSTRING_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))

every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def docstrings(tree: ast.Module) -> set[tuple[int, int]]:
    """Where the docstrings of a module, its functions and its classes begin: (line, column)."""
    places = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
            and ast.get_docstring(node, clean=False) is not None
        ):
            places.add((node.body[0].lineno, node.body[0].col_offset))
    return places


def tokens_per_line(source: str) -> float:
    """Tokens of code, over lines of code: the mean number of words and signs in a line that has any.

    Comments, docstrings, line ends and indentation are no tokens of code; a string, however long, and an f-string are one
    each. A line counts if a token of code begins in it: empty lines, comments and docstrings do not.
    """
    left_out, depth, places = docstrings(parsed(source)), 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == FSTRING_END:
            depth -= 1
        elif depth == 0 and token.type not in NO_CODE and token.start not in left_out:
            places.append(token.start[0])
        if token.type == FSTRING_START:
            depth += 1
    return len(places) / len(set(places))


def displayed_names(node: ast.Assign):
    """The names to which a tuple, list or dictionary written out is assigned: `a = (1, 2)`, `a, b = [1], [2]`."""
    for target in node.targets:
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts)
        for name, value in pairs:
            if isinstance(name, ast.Name) and isinstance(value, (ast.Tuple, ast.List, ast.Dict)):
                yield name.id


def splatted_once(source: str) -> list[str]:
    """Calls that splat a name which their function made, as a tuple, list or dictionary written out, for that call alone."""
    found = []
    for function in ast.walk(parsed(source)):
        if not isinstance(function, FUNCTIONS):
            continue
        displays, reads, splats = set(), {}, []
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                displays |= set(displayed_names(node))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                reads[node.id] = reads.get(node.id, 0) + 1
            elif isinstance(node, ast.Call):
                starred = [argument.value for argument in node.args if isinstance(argument, ast.Starred)]
                starred += [keyword.value for keyword in node.keywords if keyword.arg is None]
                splats += [(value.id, value.lineno) for value in starred if isinstance(value, ast.Name)]
        found += [f"{name}, line {line}" for name, line in splats if name in displays and reads[name] == 1]
    return sorted(set(found))


@every_script
def test_lines_are_not_packed(path):
    """8.0 leaves room above what people write: 5.6 in diffusers' train_text_to_image_lora.py, 7.1 in nanochat."""
    mean = tokens_per_line(path.read_text())
    assert mean <= 8.0, f"{mean:.2f} tokens of code a line: one argument a line, one statement a line"


@every_script
def test_no_call_splats_what_was_made_for_it_alone(path):
    found = splatted_once(path.read_text())
    assert not found, f"written out in the call they would be read at once: {'; '.join(found)}"


@every_script
def test_main_is_read_in_one_go(path):
    (main,) = (node for node in parsed(path.read_text()).body if isinstance(node, FUNCTIONS) and node.name == "main")
    assert main.end_lineno - main.lineno + 1 < 130


def test_tokens_of_code_are_counted_as_described():
    source = '"""Docstring."""\n\n# a comment\nx = f(1)  # x = f ( 1 ): 6\n\ndef g(a):\n    """Of g."""\n    return f"{a} b"\n'
    assert tokens_per_line(source) == (6 + 6 + 2) / 3
    assert tokens_per_line('x = [\n    1,\n    """two\nlines""",\n]\n') == (3 + 2 + 1 + 1 + 1) / 5


def test_splats_are_found_and_those_of_longer_use_are_not():
    source = (
        "def f(a, *rest, **more):\n"
        "    both = (a, 1)\n"
        "    g(*both)\n"  # found
        "    first, second = (a, 2), 3\n"
        "    g(*first, *second)\n"  # the first is found
        "    options = {'b': 1}\n"
        "    if a:\n"
        "        g(0, **options)\n"  # found
        "    kept = [1, 2]\n"
        "    g(*kept, len(kept))\n"  # used twice
        "    made = list(rest)\n"
        "    g(*made, *rest, **more)\n"  # no displays
    )
    assert splatted_once(source) == ["both, line 3", "first, line 5", "options, line 8"]
