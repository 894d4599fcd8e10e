"""The report and the pictures: well-formed, complete, and sortable in a browser where there is one."""

import configparser
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from acpo_utils.evaluation.grids import choose_pairs, pair_grid
from acpo_utils.evaluation.html_report import histogram, write_report
from acpo_utils.evaluation.table import finish_rows, paired_row
from tests import REPOSITORY


VOID = {"meta", "img", "br", "input"}
BASE, TUNED = [1.0, 2.0, 3.0], [1.5, 4.0, 2.9]
PROMPTS = ['a "fox" & a <b>dog</b>', "</script><script>document.title='broken'</script>", "three $ and a 'cat'"]


class Page(HTMLParser):
    """Fails on a tag that is closed out of order, and collects what the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(tmp_path):
    images = {}
    for model in ("base", "my-lora"):
        (tmp_path / "images" / model).mkdir(parents=True)
        images[model] = [f"images/{model}/set-{i} #.png" for i in range(3)]
        for i, name in enumerate(images[model]):
            Image.new("RGB", (16, 16), (80 * i, 40, 200 * (model == "base"))).save(tmp_path / name)
    (tmp_path / "grids").mkdir()
    pairs = [(tmp_path / b, tmp_path / f) for b, f in zip(images["base"], images["my-lora"])]
    pair_grid(tmp_path / "grids" / "my-lora-random.png", "a random draw", pairs, PROMPTS, columns=2)
    what = {"model": "my-lora", "prompts": "set", "metric": "judge", "guide": True, "lower_is_better": False}
    results = {
        "settings": {"pretrained_model_name_or_path": "some/model", "seed": 0, "variant": None},
        "rows": finish_rows([what | paired_row(BASE, TUNED)]),
        "scores": {"judge": {"base": BASE, "my-lora": TUNED}},
        "prompts": [{"set": "set", "row": i, "text": text} for i, text in enumerate(PROMPTS)],
        "images": images,
        "unavailable": {"fid": "no <weights>"},
        "grids": ["grids/my-lora-random.png"],
    }
    return write_report(tmp_path, results)


def test_the_report_is_well_formed_complete_and_needs_no_network(report):
    text = report.read_text()
    page = Page(text)
    assert len(page.references) == 7 and len([tag for tag, _ in page.tags if tag == "svg"]) == 2
    for reference in page.references:
        assert (report.parent / unquote(reference)).is_file()
    assert "://" not in text, "nothing comes from elsewhere"
    figures = [attributes for tag, attributes in page.tags if tag == "figure" and "data-index" in attributes]
    assert [figure["data-prompt"] for figure in figures] == PROMPTS
    assert "judge (guide)" in page.text and "fid: unavailable. no <weights>" in page.text
    changes = re.search(r'<script type="application/json" id="changes">(.*?)</script>', text).group(1)
    assert json.loads(changes) == {"judge: change by my-lora": [0.5, 2.0, -0.1]}
    assert '"null"' not in text and "None" not in page.text
    assert '<td>4.000 <span class="up">+2.000</span></td>' in text
    assert '<td>2.900 <span class="down">-0.100</span></td>' in text


def test_the_report_s_style_and_script_are_in_it_and_its_templates_in_the_package(report):
    folder = REPOSITORY / "acpo_utils"
    text = report.read_text()
    for name in ("report.css", "report.js"):
        assert (folder / "evaluation" / name).read_text().strip() in text, name
    setup_cfg = configparser.ConfigParser()
    setup_cfg.read(REPOSITORY / "setup.cfg")
    patterns = setup_cfg["options.package_data"]["acpo_utils"].split()
    shipped = {path for pattern in patterns for path in folder.glob(pattern)}
    assert {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")} <= shipped


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "chromium-headless-shell")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine; or name one in CHROMIUM")
@pytest.mark.parametrize(
    "sort, find, order",
    [(0, "", [0, 1, 2]), (1, "", [1, 0, 2]), (2, "", [2, 0, 1]), (1, "CAT", [1, 0, 2]), (0, "no such", [0, 1, 2])],
)
def test_a_browser_sorts_by_the_change_and_finds_prompts(report, sort, find, order):
    """The page itself, and after it a script that does what a reader does with the mouse."""
    steps = (
        f"document.getElementById('sort').selectedIndex = {sort}; document.getElementById('find').value = '{find}';"
        "document.getElementById('sort').dispatchEvent(new Event('change'));"
        "const seen = [...document.querySelectorAll('#pairs figure')];"
        "const state = seen.map(f => [Number(f.dataset.index), !f.hidden]);"
        "document.documentElement.dataset.state = JSON.stringify({state, title: document.title,"
        " count: document.getElementById('count').textContent});"
    )
    page = report.with_name("driven.html")
    page.write_text(report.read_text().replace("</body>", f"<script>{steps}</script></body>"))
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r'data-state="([^"]*)"', dom).group(1).replace("&quot;", '"'))
    assert [index for index, _ in found["state"]] == order
    shown = [index for index, visible in found["state"] if visible]
    assert set(shown) == {"": {0, 1, 2}, "CAT": {2}, "no such": set()}[find]
    assert found["count"] == f"{len(shown)} of 3" and found["title"] == "my-lora against some/model"


def test_histogram_counts_every_value_and_survives_equal_ones():
    svg = histogram({"base": [0.0, 0.0, 1.0], "tuned": [0.5, 1.0, 1.0]}, bins=4)
    counts = [int(n) for n in re.findall(r"<title>\w+: (\d+) from", svg)]
    assert sum(counts) == 6 and svg.count('class="base"') == 2 and svg.count('class="tuned"') == 2
    assert histogram({"change": [-1.0, 3.0]}, zero=True).count("<line") == 2
    assert "<rect" in histogram({"change": [2.0, 2.0]}, zero=True)


def test_gains_losses_and_a_draw_that_does_not_choose():
    changes = [0.5, -2.0, 0.0, 3.0, -0.1, 1.0]
    chosen = choose_pairs(changes, 2)
    assert chosen["gains"] == [3, 5] and chosen["losses"] == [1, 4] and len(chosen["random"]) == 2
    assert choose_pairs(changes, 10)["gains"] == [3, 5, 0] and choose_pairs(changes, 10)["losses"] == [1, 4]
    assert choose_pairs(changes, 10)["random"] == [0, 1, 2, 3, 4, 5]
    draws = {tuple(choose_pairs(np.flip(changes), 2, seed)["random"]) for seed in range(20)}
    assert len(draws) > 5 and tuple(choose_pairs(changes, 2, 3)["random"]) in draws, "a draw knows no changes"


def test_a_grid_has_base_over_fine_tuned(report, tmp_path):
    with Image.open(tmp_path / "grids" / "my-lora-random.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = np.argwhere((pixels[..., 2] == 200) & (pixels[..., 1] == 40))  # base pictures
    tuned = np.argwhere((pixels[..., 2] == 0) & (pixels[..., 1] == 40))
    assert len(blue) > 1000 and len(tuned) > 1000
    assert blue[:, 0].min() < tuned[:, 0].min() and blue[:, 0].max() < tuned[:, 0].max()
    with pytest.raises(ValueError, match="at least one pair"):
        pair_grid(tmp_path / "x.png", "", [], [])
