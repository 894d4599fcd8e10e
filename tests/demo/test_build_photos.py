"""The embedded photographs: reading Qt resources and licences, and what the shipped files promise."""

import runpy
import struct
import zlib

import pytest
from datasets import load_dataset

from tests import REPOSITORY


SCRIPT = runpy.run_path(str(REPOSITORY / "examples/demo/build_photos.py"))
PHOTOS = REPOSITORY / "examples/demo/photos"


def rcc(files, version):
    """A Qt resource of one folder "a" with `files` {name: content}, every second one compressed."""
    names, data, entries = b"", b"", []

    def add_name(name):
        nonlocal names
        offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return offset

    folder = add_name("a")
    for number, (name, content) in enumerate(files.items()):
        body = struct.pack(">I", len(content)) + zlib.compress(content) if number % 2 else content
        entries.append((add_name(name), number % 2, len(data)))
        data += struct.pack(">i", len(body)) + body
    stamp = b"" if version == 1 else bytes(8)
    tree = struct.pack(">iHii", 0, 2, 1, 1) + stamp + struct.pack(">iHii", folder, 2, len(files), 2) + stamp
    for name, flags, offset in entries:
        tree += struct.pack(">iHHHi", name, flags, 0, 0, offset) + stamp
    head = 20
    offsets = (version, head + len(data) + len(names), head, head + len(data))
    return b"qres" + struct.pack(">4i", *offsets) + data + names + tree


@pytest.mark.parametrize("version", [1, 2])
def test_read_rcc(tmp_path, version):
    path = tmp_path / "x.rcc"
    path.write_bytes(rcc({"fox.webp": b"pixels", "README": b"text " * 50}, version))
    assert dict(SCRIPT["read_rcc"](path)) == {"/a/fox.webp": b"pixels", "/a/README": b"text " * 50}
    path.write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="expected a Qt resource file"):
        SCRIPT["read_rcc"](path)


def test_read_licenses():
    text = """Copyright: A. Fox / Wikimedia Commons
Source: https://example.org/fox
License: CC-BY-SA 4.0
Comments: cropping, sharpening
Files: fox.webp

Copyright: B. Owl
License: Public domain
Files:
owl.webp
day/heron.webp

Copyright: C. Cat
License: GPLv2+
Files:
cat.webp

License: CC0-1.0
Files: nobody.webp

Files: 16.04/bee_by_D.jpg
Copyright: 2018, D. Bee
           2019, E. Bee
License: CC-BY-4.0
"""
    found = SCRIPT["read_licenses"](text)
    assert sorted(found) == ["bee_by_D", "fox", "heron", "owl"]
    assert found["fox"] == {
        "author": "A. Fox",
        "license": "CC-BY-SA-4.0",
        "source": "https://example.org/fox",
        "changes": "cropping, sharpening",
    }
    assert found["heron"]["license"] == "Public domain"
    assert found["bee_by_D"]["author"] == "2018, D. Bee, 2019, E. Bee"


def test_shipped_photographs_are_licensed_and_split(tmp_path):
    splits = load_dataset(str(PHOTOS), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 85, "validation": 12, "test": 24}
    names = [name for rows in splits.values() for name in rows["name"]]
    assert len(set(names)) == len(names)
    readme = (PHOTOS / "README.md").read_text()
    for rows in splits.values():
        for row in rows.remove_columns("image"):
            assert row["author"] and SCRIPT["LICENSE"].fullmatch(row["license"])
            assert f"| {row['name']} | " in readme
    assert sum(path.stat().st_size for path in PHOTOS.iterdir()) < 25e6
    assert min(splits["test"][0]["image"].size) == 384
