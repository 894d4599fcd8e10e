"""The HTML report of an evaluation: one file that opens offline, beside the images it shows."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from acpo_utils.evaluation.table import evaluation_notes, table_cells
from acpo_utils.files import atomic_write


STYLE = """
:root { color-scheme: light dark; --line: #8885; --base: #888; --tuned: #2a7fd4; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th.text, td.text { text-align: left; }
.guide { background: var(--soft); }
.charts, .grids, #pairs { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.charts figure, .grids figure, #pairs figure { margin: 0; }
.charts figcaption, #pairs figcaption { font-size: .8rem; }
svg .base { fill: var(--base); opacity: .6; } svg .tuned { fill: var(--tuned); opacity: .6; }
svg text { font-size: 10px; fill: currentColor; } svg line { stroke: currentColor; }
.grids img { max-width: 100%; height: auto; background: #fff; }
#pairs figure { width: calc(var(--shown) * 9rem); border-top: 1px solid var(--line); padding-top: .4rem; }
#pairs .row { display: flex; gap: .3rem; }
#pairs .cell { width: 8.8rem; font-size: .72rem; font-variant-numeric: tabular-nums; }
#pairs img { width: 100%; image-rendering: auto; display: block; }
#pairs .up { color: #1a8f4c; } #pairs .down { color: #c8432b; }
.controls { position: sticky; top: 0; padding: .5rem 0; background: Canvas; display: flex; gap: 1rem; flex-wrap: wrap; }
"""

SCRIPT = """
const pairs = document.getElementById("pairs");
const figures = Array.from(pairs.children);
const sort = document.getElementById("sort"), find = document.getElementById("find");
const changes = JSON.parse(document.getElementById("changes").textContent);
function show() {
  const [key, direction] = JSON.parse(sort.value);
  const value = figure => key === null ? -figure.dataset.index : direction * changes[key][figure.dataset.index];
  figures.sort((a, b) => value(b) - value(a) || a.dataset.index - b.dataset.index);
  const text = find.value.trim().toLowerCase();
  let count = 0;
  for (const figure of figures) {
    figure.hidden = text !== "" && !figure.dataset.prompt.toLowerCase().includes(text);
    count += !figure.hidden;
  }
  pairs.replaceChildren(...figures);
  document.getElementById("count").textContent = count + " of " + figures.length;
}
sort.addEventListener("change", show);
find.addEventListener("input", show);
show();
"""


def histogram(series: dict[str, Sequence[float]], bins: int = 24, zero: bool = False) -> str:
    """An inline SVG: the counts of each series, drawn over one another in classes `base` and `tuned`.

    `zero` marks where the values change their sign.
    """
    width, height, floor = 260, 110, 92
    values = np.concatenate([np.asarray(list(part), dtype=np.float64) for part in series.values()])
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = {name: np.histogram(part, bins, (low, high))[0] for name, part in series.items()}
    top = max(1, max(int(count.max()) for count in counts.values()))
    step = width / bins
    parts = []
    for kind, (name, count) in zip(("base", "tuned") if len(series) > 1 else ("tuned",), counts.items()):
        for i, n in enumerate(count.tolist()):
            if n:
                bar = floor * n / top
                place = f'x="{i * step:.1f}" y="{floor - bar:.1f}" width="{step - 1:.1f}" height="{bar:.1f}"'
                label = f"{name}: {n} from {low + (high - low) * i / bins:.4g} to {low + (high - low) * (i + 1) / bins:.4g}"
                parts.append(f'<rect class="{kind}" {place}><title>{html.escape(label)}</title></rect>')
    if zero and low < 0 < high:
        x = width * -low / (high - low)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{floor}" stroke-dasharray="3 3" />')
    parts.append(f'<line x1="0" x2="{width}" y1="{floor}" y2="{floor}" />')
    parts.append(f'<text x="0" y="{height - 4}">{low:.4g}</text>')
    parts.append(f'<text x="{width}" y="{height - 4}" text-anchor="end">{high:.4g}</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'


def write_report(folder: str | Path, results: dict) -> Path:
    """Writes `folder/report.html`, of what is in `folder/results.json`: table, distributions, grids, every pair.

    Images are named relative to `folder`; no script, font or style comes from elsewhere. Without JavaScript everything
    is shown, in the order of the prompts.
    """
    tuned = [model for model in results["images"] if model != "base"]
    changes = {
        f"{metric}: change by {model}": [round(b - a, 6) for a, b in zip(values["base"], values[model])]
        for metric, values in results["scores"].items()
        for model in tuned
    }
    base = "/".join(Path(results["settings"]["pretrained_model_name_or_path"]).parts[-2:])
    title = f"{', '.join(tuned)} against {base}"
    data = json.dumps(changes).replace("<", "\\u003c")
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{len(results['prompts'])} pairs of images: same prompts, same initial noise, same scheduler.</p>",
        f'<h2>Table</h2><div class="wide">{_table(results)}</div>',
        *(f"<p>{html.escape(line)}</p>" for line in evaluation_notes(results).split("\n") if line),
        f'<h2>Distributions</h2><div class="charts">{_distributions(results, tuned, changes)}</div>'
        if changes
        else "",
        f'<h2>Gains, losses and a random draw</h2><div class="grids">{_grids(results)}</div>',
        f"<h2>Every pair</h2>{_controls(changes)}",
        f'<div id="pairs" style="--shown: {len(results["images"])}">{_pairs(results)}</div>',
        f"<h2>Settings</h2><div class=wide>{_settings(results['settings'])}</div>",
        f'<script type="application/json" id="changes">{data}</script><script>{SCRIPT}</script>',
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n'
    path = Path(folder) / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(page + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")
    return path


def _table(results: dict) -> str:
    header, *lines = table_cells(results["rows"])
    names = header.index("metric") + 1

    def cells(line: list[str], tag: str) -> str:
        kinds = [' class="text"' if i < names else "" for i in range(len(line))]
        return "".join(f"<{tag}{kind}>{html.escape(text)}</{tag}>" for text, kind in zip(line, kinds))

    rows = [
        f"<tr{' class=guide' if row['guide'] else ''}>{cells(line, 'td')}</tr>"
        for line, row in zip(lines, results["rows"])
    ]
    return f"<table><thead><tr>{cells(header, 'th')}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _distributions(results: dict, tuned: list[str], changes: dict) -> str:
    parts = []
    for metric, values in results["scores"].items():
        for model in tuned:
            name = html.escape(f"{metric}, {model}")
            both = histogram({"base": values["base"], model: values[model]})
            change = histogram({"change": changes[f"{metric}: change by {model}"]}, zero=True)
            parts.append(f"<figure>{both}<figcaption>{name}: base grey, fine-tuned blue</figcaption></figure>")
            parts.append(f"<figure>{change}<figcaption>{name}: change</figcaption></figure>")
    return "".join(parts)


def _grids(results: dict) -> str:
    return "".join(
        f'<figure><img src="{_url(path)}" alt="{html.escape(Path(path).stem)}" loading="lazy"></figure>'
        for path in results["grids"]
    )


def _controls(changes: dict) -> str:
    options = ["<option value='[null, 1]'>order of the prompts</option>"]
    for key in changes:
        for direction, word in ((1, "largest gain first"), (-1, "largest loss first")):
            value = html.escape(json.dumps([key, direction]))
            options.append(f'<option value="{value}">{html.escape(key)}, {word}</option>')
    return (
        f'<p class="controls"><label>Sort by <select id="sort">{"".join(options)}</select></label>'
        '<label>Prompt contains <input id="find" type="search"></label><span id="count"></span></p>'
    )


def _pairs(results: dict) -> str:
    figures = []
    for i, prompt in enumerate(results["prompts"]):
        cells = []
        for model, images in results["images"].items():
            lines = [html.escape(model)]
            for metric, values in results["scores"].items():
                score = f"{html.escape(metric)} {values[model][i]:.4g}"
                if change := values[model][i] - values["base"][i]:
                    score += f' <span class="{"up" if change > 0 else "down"}">{change:+.3g}</span>'
                lines.append(score)
            image = f'<img src="{_url(images[i])}" alt="{html.escape(model)}" loading="lazy">'
            cells.append(f'<div class="cell">{image}{"<br>".join(lines)}</div>')
        text = html.escape(prompt["text"] or f"{prompt['set']} {prompt['row']}")
        caption = f"<figcaption>{text}</figcaption>"
        figures.append(
            f'<figure data-index="{i}" data-prompt="{text}"><div class="row">{"".join(cells)}</div>{caption}</figure>'
        )
    return "\n".join(figures)


def _settings(settings: dict) -> str:
    rows = [
        f'<tr><td class="text">{html.escape(name)}</td><td class="text">{html.escape(str(value))}</td></tr>'
        for name, value in settings.items()
        if value is not None
    ]
    return f"<table>{''.join(rows)}</table>"


def _url(path: str) -> str:
    from urllib.parse import quote

    return quote(path)
