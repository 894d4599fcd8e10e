"""Prompt lists in the forms people have them in: read, or refused in one line that says what to do."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from acpo_utils.data import read_prompts
from acpo_utils.data.prompt_sets import read_prompt_set


PROMPTS = ["a fox", "two words, and a comma"]


def refusal(path, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        read_prompts(path, *arguments)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


CONTENT = {
    ".txt": "a fox\n\ntwo words, and a comma\n",
    "": "a fox\r\ntwo words, and a comma",
    ".csv": 'id,prompt\n1,a fox\n2,"two words, and a comma"\n',
    ".tsv": "prompt\tid\na fox\t1\ntwo words, and a comma\n",
    ".jsonl": '{"prompt": "a fox"}\n{"text": "two words, and a comma", "id": 2}\n',
    ".json": json.dumps(PROMPTS, indent=1),
}


@pytest.mark.parametrize("ending", [*CONTENT, ".CSV", ".Tsv", ".TXT", ".JSONL", ".JSON"])
def test_every_ending_in_small_letters_and_capitals(tmp_path, ending):
    (tmp_path / f"prompts{ending}").write_text(CONTENT[ending.lower()])
    assert read_prompts(tmp_path / f"prompts{ending}") == PROMPTS
    if ending:  # of a prompt set by its name, too
        assert [prompt.text for prompt in read_prompt_set(str(tmp_path / f"prompts{ending}"))] == PROMPTS


def test_parquet_in_capitals(tmp_path):
    parquet.write_table(pyarrow.table({"prompt": PROMPTS}), tmp_path / "prompts.PARQUET")
    assert read_prompts(tmp_path / "prompts.PARQUET") == PROMPTS


@pytest.mark.parametrize(
    "content",
    [
        PROMPTS,
        [{"id": 1, "prompt": "a fox"}, {"Prompt": " two words, and a comma\n", "text": "not this"}],
        [{"text": "a fox"}, {"prompt": "two words, and a comma"}],
    ],
)
def test_a_json_list_of_strings_or_of_objects(tmp_path, content):
    (tmp_path / "prompts.json").write_text("\ufeff" + json.dumps(content, indent=2), encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.json") == PROMPTS


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.json",
            '{"prompts": ["a fox"]}',
            'expected a list of strings, or of objects with "prompt" or "text", found',
        ),
        ("a.json", '{"1": {"prompt": "a fox"}}', "found an object with 1"),
        ("a.json", '["a fox", 3]', "row 2: expected text in column `prompt` or `text`, found 3"),
        ("a.json", '["a fox", {"caption": "an owl"}]', "row 2: expected text in column `prompt` or `text`"),
        ("a.json", '["a fox", ""]', "row 2"),
        ("a.json", "[]", "is empty"),
        ("a.json", '["a fox",\n', "expected JSON, found: "),
        (
            "a.json",
            '{"prompt": "a fox"}\n{"prompt": "an owl"}\n',
            "A file with an object in each line is named .jsonl.",
        ),
        ("a.txt", json.dumps(PROMPTS, indent=1), "found JSON: name it .json or .jsonl"),
        ("a.txt", '{"prompt": "a fox"}\n{"prompt": "an owl"}\n', "found JSON: name it .json or .jsonl"),
        ("prompts", '[{"prompt": "a fox"}]', "found JSON"),
        (
            "a.yaml",
            "prompts:\n- a fox\n",
            "expected .txt (a prompt in each line), .csv, .tsv, .json, .jsonl or .parquet",
        ),
        ("a.yml", "- a fox\n", "found .yml"),
        ("a.md", "a fox\n", "found .md"),
        ("a.xlsx", "PK", "found .xlsx"),
        (
            "a.csv",
            "id;prompt\n1;a fox\n",
            "line 1: expected commas between the columns, found semicolons in 'id;prompt'",
        ),
        ("a.csv", "id\tprompt\n1\ta fox\n", "found tabs in"),
        ("a.tsv", "id,prompt\n1,a fox\n", "expected tabs between the columns, found commas"),
        ("a.csv", "prompt\na fox\na cat, asleep\n", "row 2: expected 1 cells, found 2: put quotes around text"),
        ("a.csv", 'prompt\na fox\n"an owl\na tree\n', "row 2: expected a closing quote"),
    ],
)
def test_what_is_refused_says_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert message in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl"])
def test_another_encoding_is_named_with_its_line(tmp_path, name):
    (tmp_path / name).write_bytes("prompt\na fox\na café\n".encode("cp1252"))
    message = refusal(tmp_path / name)
    assert "expected UTF-8 text, found byte 0xe9 in line 3" in message and "save it as UTF-8" in message
    (tmp_path / name).write_bytes("prompt\na fox\n".encode("utf-16"))
    assert "found byte 0xff in line 1" in refusal(tmp_path / name)
    (tmp_path / name).write_bytes("prompt\na fox\n".encode("utf-16-le"))
    assert "found a zero byte in line 1" in refusal(tmp_path / name)


def test_an_archive_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"PK\3\4 and more")
    assert "found a zip archive: unpack it" in refusal(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="regions.json: expected UTF-8 text, found a gzip archive: unpack it"):
        (tmp_path / "regions.json").write_bytes(b"\x1f\x8b\x08")
        read_prompt_set(f"visual-genome:{tmp_path / 'regions.json'}")


def test_prompts_that_only_look_like_json(tmp_path):
    texts = ["[cat:dog:0.5] in a garden", "{a|b} in a garden", "null", "3"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    assert read_prompts(tmp_path / "a.txt") == texts


def test_words_that_pandas_would_leave_out(tmp_path):
    words = ["None", "NA", "null", "nan", "N/A"]
    for ending, head in ((".csv", "prompt\n"), (".tsv", "prompt\n"), (".txt", "")):
        (tmp_path / f"a{ending}").write_text(head + "\n".join(words))
        assert read_prompts(tmp_path / f"a{ending}") == words


def test_a_path_is_a_path(tmp_path):
    for folder in ("cats 1", "cats [1]", "what?*"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
        parquet.write_table(pyarrow.table({"prompt": [folder]}), tmp_path / folder / "a.parquet")
    for folder in ("cats 1", "cats [1]", "what?*"):
        for name in ("a.txt", "a.parquet"):
            assert read_prompts(tmp_path / folder / name) == [folder]
