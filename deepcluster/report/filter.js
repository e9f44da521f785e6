// The filter of cards, table and map, the legend, and the sorting of the table.
let lower = null;
const rows = all(".sizes tbody tr"), articles = all("article");

function filter() {
  const wanted = $("filter").value.trim().toLowerCase(), exact = /^(?:cluster |#)(\d+)$/.exec(wanted);
  lower ||= D.paths.map((one) => (D.prefix + one).toLowerCase());
  const fits = D.clusters.map((one, c) => exact ? String(one.id) === exact[1] : label(c).toLowerCase().includes(wanted));
  const found = new Uint8Array(D.m), inCluster = new Uint32Array(D.clusters.length);
  let images = 0;
  for (let i = 0; i < D.m; i++) {
    if (fits[place[i]] || (!exact && lower[i].includes(wanted))) { found[i] = 1; images++; inCluster[place[i]]++; }
  }
  matches = wanted ? found : null;
  const kept = (c) => !wanted || fits[c] || inCluster[c] > 0;
  for (const one of [...rows, ...articles]) one.hidden = !kept(Number(one.dataset.c));
  for (const one of all("article button[data-i], #copies button[data-i]")) one.classList.toggle("out", Boolean(matches) && !matches[one.dataset.i]);
  const clusters = D.clusters.filter((_, c) => kept(c)).length;
  $("matches").textContent = wanted ? `${count(images, "image")} in ${count(clusters, "cluster")}` : "";
  redraw();
}
let soon = 0;
$("filter").value = "";
$("filter").oninput = () => { clearTimeout(soon); soon = setTimeout(filter, 120); };

for (const c of n ? D.clusters.keys() : []) {
  const one = button("", () => {
    only = only === c ? -1 : c;
    for (const other of $("legend").children) other.setAttribute("aria-pressed", String(other === one && only === c));
    redraw();
  });
  one.setAttribute("aria-pressed", "false");
  one.append(dot(c), make("span", { className: "called", "data-c": c }, label(c)));
  $("legend").append(one);
}

function sort(head) {
  const body = head.closest("table").tBodies[0], up = head.getAttribute("aria-sort") === "descending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => Number(row.cells[head.cellIndex].dataset.v);
  body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * (value(a) - value(b))));
}
for (const head of all(".sizes thead th")) head.firstElementChild.onclick = () => sort(head);
