"""The version is in one place, and the changelog tells what it changed; a copied script notices an acpo_utils too old."""

import configparser
import importlib
import re
import subprocess
import sys

import pytest
import yaml

import acpo_utils
from tests import REPOSITORY


CHANGELOG = (REPOSITORY / "CHANGELOG.md").read_text()
# The changelog's table of what has moved: | `old` | `new` |
MOVED = re.findall(r"^ *\| `(acpo_utils[\w.]*)` \| `(acpo_utils[\w.]*)` \|$", CHANGELOG, re.M)


def find(name: str):
    """The module, or what is in it, of that full name; AttributeError or ModuleNotFoundError where there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_setup_cfg_citation_and_changelog_have_the_packages_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", acpo_utils.__version__)
    setup_cfg = configparser.ConfigParser()
    setup_cfg.read(REPOSITORY / "setup.cfg")
    assert setup_cfg["metadata"]["version"] == "attr: acpo_utils.__version__"
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == acpo_utils.__version__
    versions = re.findall(r"^## \[(.+?)\] - \d{4}-\d\d-\d\d$", CHANGELOG, re.M)
    assert versions[0] == acpo_utils.__version__ and versions[-1] == "0.1.0"
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)


@pytest.mark.parametrize("old, new", MOVED)
def test_what_the_changelog_says_has_moved_is_there(old, new):
    find(new)
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        find(old)


def test_the_changelogs_table_is_read():
    assert len(MOVED) > 20


@pytest.mark.parametrize("minimum", ["0.0.9", "0.9.9", "0.10.0", "0.10"])
def test_a_version_that_is_new_enough(monkeypatch, minimum):
    monkeypatch.setattr(acpo_utils, "__version__", "0.10.0")
    acpo_utils.check_min_version(minimum)


@pytest.mark.parametrize("minimum", ["0.10.1", "0.11.0", "1.0.0"])
def test_a_version_that_is_too_old_is_an_error_of_one_line(monkeypatch, minimum):
    monkeypatch.setattr(acpo_utils, "__version__", "0.10.0")
    with pytest.raises(
        ImportError, match=f"needs acpo_utils {re.escape(minimum)} or later, found 0.10.0: .*pip install"
    ) as error:
        acpo_utils.check_min_version(minimum)
    assert "\n" not in str(error.value)


def test_the_check_comes_before_anything_heavy():
    code = f"import sys, acpo_utils; acpo_utils.check_min_version({acpo_utils.__version__!r}); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert run.stdout.strip() == "False"
