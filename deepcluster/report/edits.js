// Decisions: names, junk and merges, kept in the page until they are downloaded.
const named = new Map(), junk = new Set(), picked = new Set();
let groups = [], unsaved = false;
const id = (c) => D.clusters[c].id;
const byId = (values) => [...values].sort((a, b) => id(a) - id(b));

function decisions() {
  const called = Object.fromEntries(byId(named.keys()).map((c) => [id(c), named.get(c)]));
  const merge = groups.map((group) => byId(group).map(id)).sort((a, b) => a[0] - b[0]);
  return { format: 1, of: D.of, names: called, merge, junk: byId(junk).map(id) };
}

function rename(c, text) {
  const name = text.trim();
  if (name === D.clusters[c].name) named.delete(c);
  else named.set(c, name);
  names[c] = name;
  for (const one of all(`.called[data-c="${c}"]`)) one.textContent = label(c);
}

function join(picks) {
  const met = groups.filter((group) => picks.some((c) => group.includes(c)));
  groups = groups.filter((group) => !met.includes(group));
  groups.push([...new Set([...picks, ...met.flat()])]);
}

function show(changed = true) {
  if (changed) unsaved = true;
  const undo = (text, back) => make("li", {}, text + " ", button("Take back", () => { back(); show(); $("decisions").scrollIntoView({ block: "nearest" }); }));
  const lines = [
    ...byId(named.keys()).map((c) => undo(`Cluster ${id(c)} is called “${named.get(c)}”.`, () => {
      card(c).querySelector("input.name").value = D.clusters[c].name;
      rename(c, D.clusters[c].name);
    })),
    ...groups.map((group) => undo(`Clusters ${byId(group).map(id).join(", ")} become one.`, () => { groups = groups.filter((g) => g !== group); })),
    ...byId(junk).map((c) => undo(`${label(c)} is junk.`, () => { junk.delete(c); card(c).querySelector("input.junk").checked = false; })),
  ];
  $("list").replaceChildren(...lines);
  const made = lines.length;
  $("tray").hidden = !made && !picked.size;
  $("sum").textContent = [made ? count(made, "decision") : "", picked.size ? `${picked.size} picked to merge` : ""].filter(Boolean).join(" · ");
  $("join").disabled = picked.size < 2;
  $("join").hidden = !picked.size;
  for (const one of all(".download")) one.disabled = !made;
  for (const one of all("article")) {
    const c = Number(one.dataset.c), group = groups.find((g) => g.includes(c));
    one.classList.toggle("junk", junk.has(c) || D.clusters[c].junk);
    one.querySelector(".pick").checked = picked.has(c);
    one.querySelector(".fate").textContent = group ? "Merges with " + byId(group).filter((o) => o !== c).map(id).join(", ") : "";
  }
}
const card = (c) => $("c" + id(c));

for (const one of all("article")) {
  const c = Number(one.dataset.c), tick = (input, set) => { input.onchange = () => { set[input.checked ? "add" : "delete"](c); show(); }; };
  const name = one.querySelector("input.name");
  name.value = D.clusters[c].name; // not what a browser kept from before a reload
  name.oninput = () => { rename(c, name.value); show(); redraw(); };
  const boxes = [one.querySelector("input.junk"), one.querySelector("input.pick")];
  boxes[0].checked = D.clusters[c].junk;
  boxes[1].checked = false;
  tick(boxes[0], junk);
  tick(boxes[1], picked);
}
$("join").onclick = () => {
  join([...picked]);
  picked.clear();
  show();
  say($("sum").textContent);
};
for (const one of all(".download")) {
  one.onclick = () => {
    save(JSON.stringify(decisions(), null, 2) + "\n", "decisions.json");
    unsaved = false;
    say("Downloaded decisions.json; apply it with the command below Decisions");
  };
}
$("copycommand").onclick = () => copy($("command").textContent, $("command").textContent);
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
show(false);
