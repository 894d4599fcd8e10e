// Sorts the pairs by a metric's change, and shows those whose prompt contains a text.
const pairs = document.getElementById("pairs");
const figures = Array.from(pairs.children);
const sort = document.getElementById("sort");
const find = document.getElementById("find");
const changes = JSON.parse(document.getElementById("changes").textContent);

function show() {
  const { metric, direction } = sort.selectedOptions[0].dataset;
  const value = figure => (metric === undefined ? 0 : direction * changes[metric][figure.dataset.index]);
  figures.sort((a, b) => value(b) - value(a) || a.dataset.index - b.dataset.index);
  const text = find.value.trim().toLowerCase();
  let count = 0;
  for (const figure of figures) {
    figure.hidden = !figure.dataset.prompt.toLowerCase().includes(text);
    count += !figure.hidden;
  }
  pairs.replaceChildren(...figures);
  document.getElementById("count").textContent = `${count} of ${figures.length}`;
}

sort.addEventListener("change", show);
find.addEventListener("input", show);
show();
