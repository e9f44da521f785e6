// What opens beside the page: one image with its neighbours, and the selection.
let opener = null;

function look(i, from) {
  const panel = $("look"), c = place[i], facts = make("dl");
  if (!panel.contains(from)) opener = from;
  const fact = (name, ...value) => facts.append(make("dt", {}, name), make("dd", {}, ...value));
  const card = $("c" + D.clusters[c].id), named = [dot(c), label(c)];
  fact("Cluster", card ? make("a", { href: "#c" + D.clusters[c].id, onclick: close }, ...named) : make("span", {}, ...named));
  fact("Probability", (probability[i] / 255).toFixed(2));
  if (confidence.length) fact("Confidence", (confidence[i] / 255).toFixed(2));
  if (D.odd[i]) fact("Odd", D.odd[i]);
  if (D.copies[i]) fact("A copy of", D.copies[i]);
  const around = make("div", { className: "pics" });
  for (let k = 0; k < D.k; k++) {
    const j = near[i * D.k + k];
    if (j === NONE) continue;
    const one = shown(j, "");
    one.append(make("small", {}, dot(place[j]), (far[i * D.k + k] / 32767).toFixed(2)));
    one.title += "\n" + label(place[j]);
    around.append(one);
  }
  $("what").textContent = short(i);
  $("body").replaceChildren(
    ...(D.tile ? [make("div", { className: "large" }, picture(i))] : []),
    make("p", { className: "path" }, path(i)),
    make("div", { className: "tools" }, button("Copy path", () => copy(path(i), path(i))),
      ...(n ? [button("Show on the map", () => { visit(i); canvas.scrollIntoView({ block: "center" }); })] : [])),
    facts,
    ...(D.k ? [make("h3", {}, "Nearest neighbours"), make("p", { className: "note" }, "With their cosine distance; 0 is the same."), around] : []),
  );
  around.classList.toggle("paths", !D.tile);
  panel.hidden = false;
  panel.scrollTop = 0;
  $("what").focus();
}

function close() {
  $("look").hidden = true;
  if (opener) opener.focus({ preventScroll: true });
  opener = null;
}
$("close").onclick = close;
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!$("look").hidden) close();
  else if (selected) select(null);
});

const LISTED = 48;
function select(found) {
  const ids = [];
  for (let i = 0; found && i < n; i++) if (found[i]) ids.push(i);
  selected = ids.length ? found : null;
  $("selected").hidden = !ids.length;
  $("chosen").textContent = count(ids.length, "image") + " selected";
  if (ids.length) say($("chosen").textContent);
  const sizes = new Map();
  for (const i of ids) sizes.set(place[i], (sizes.get(place[i]) || 0) + 1);
  const largest = [...sizes].sort((a, b) => b[1] - a[1]);
  $("counts").replaceChildren(...largest.map(([c, size]) => make("li", {}, dot(c), `${label(c)}: ${number(size)}`)));
  $("some").replaceChildren(...ids.slice(0, LISTED).map((i) => shown(i)));
  $("some").classList.toggle("paths", !D.tile);
  $("more").textContent = ids.length > LISTED ? `and ${number(ids.length - LISTED)} more; all of them are copied.` : "";
  $("copy").onclick = () => copy(ids.map(path).join("\n"), count(ids.length, "path"));
  redraw();
}
$("none").onclick = () => { select(null); canvas.focus({ preventScroll: true }); };
