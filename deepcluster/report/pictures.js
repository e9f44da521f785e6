// Pictures: tiles of the sheets at the end of the page, decoded when first needed, and the larger ones of the cards.
const sheets = new Map();

function sheet(s, then) {
  let one = sheets.get(s);
  if (!one) {
    const text = $("sheet" + s);
    if (!text) return null; // the end of the page is not there yet
    one = new Image();
    one.src = text.textContent;
    text.remove();
    sheets.set(s, one);
  }
  if (one.complete && one.naturalWidth) return one;
  if (then) one.addEventListener("load", then, { once: true });
  return null;
}

// Draws image i at (x, y); false while its sheet is being decoded, and then() is called when it is there.
function tile(pen, i, x, y, side, then) {
  const whole = D.columns * D.columns, source = sheet(Math.floor(i / whole), then), at = i % whole;
  if (!source) return false;
  pen.imageSmoothingEnabled = D.tile >= 48;
  pen.drawImage(source, (at % D.columns) * D.tile, Math.floor(at / D.columns) * D.tile, D.tile, D.tile, x, y, side, side);
  return true;
}

function picture(i) {
  const tiny = D.tile < 48 ? "tiny" : "";
  if (!D.tile || blank.has(i)) return make("span", { className: "nothing" }, short(i));
  if (GALLERY[i]) return make("img", { src: GALLERY[i], alt: path(i), className: tiny, decoding: "async" });
  const canvas = make("canvas", { width: D.tile, height: D.tile, role: "img", "aria-label": path(i), className: tiny });
  const draw = () => tile(canvas.getContext("2d"), i, 0, 0, D.tile, draw);
  draw();
  return canvas;
}

function fill(one, i, caption = D.odd[i] || "") {
  one.title = path(i) + (D.odd[i] ? "\n" + D.odd[i] : "");
  one.append(picture(i));
  if (HEATS[i]) one.append(make("img", { src: HEATS[i], alt: "", className: "heat" }));
  if (caption) one.append(make("small", {}, caption));
  one.onclick = () => look(i, one);
  return one;
}
const shown = (i, caption) => fill(make("button", { type: "button", className: D.odd[i] ? "far" : "" }), i, caption);

for (const one of all(".pics button")) {
  one.closest(".pics").classList.toggle("paths", !D.tile);
  fill(one, Number(one.dataset.i));
}
for (const one of all("i.dot")) dot(Number(one.dataset.c), one);
$("heat").onchange = () => document.body.classList.toggle("heated", $("heat").checked);
