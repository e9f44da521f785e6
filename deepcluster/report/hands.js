// Pointers, wheel and keys on the map.
const tip = $("tip"), held = new Map();
let lassoing = false, down = null, moved = false, pinch = 0, hovered = -1;
const world = ([x, y]) => [(x - view.x) / view.s, (y - view.y) / view.s];
const at = (event) => [event.offsetX, event.offsetY];

function hover(i, x, y) {
  if (i !== hovered) {
    hovered = i;
    tip.hidden = i < 0;
    if (i >= 0) tip.replaceChildren(...(D.tile && !blank.has(i) ? [picture(i)] : []), make("b", {}, short(i)), make("span", {}, dot(place[i]), label(place[i])));
  }
  canvas.style.cursor = i >= 0 ? "pointer" : lassoing ? "crosshair" : "grab";
  if (i < 0) return;
  tip.style.left = Math.max(4, Math.min(x + 14, width - tip.offsetWidth - 4)) + "px";
  tip.style.top = (y + 14 + tip.offsetHeight > height ? Math.max(4, y - tip.offsetHeight - 14) : y + 14) + "px";
}

function inside(line, x, y) {
  let odd = false;
  for (let a = 0, b = line.length - 1; a < line.length; b = a++) {
    const [xa, ya] = line[a], [xb, yb] = line[b];
    if (ya > y !== yb > y && x < ((xb - xa) * (y - ya)) / (yb - ya) + xa) odd = !odd;
  }
  return odd;
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  held.set(event.pointerId, at(event));
  canvas.focus({ preventScroll: true });
  crossed = moved = false;
  pinch = 0;
  down = at(event);
  poly = held.size === 1 && (lassoing || event.shiftKey) ? [world(down)] : [];
});
canvas.addEventListener("pointermove", (event) => {
  const [x, y] = at(event);
  if (!held.has(event.pointerId)) {
    hover(nearest(x, y, 12), x, y);
    return;
  }
  const [px, py] = held.get(event.pointerId);
  held.set(event.pointerId, [x, y]);
  moved ||= Math.hypot(x - down[0], y - down[1]) > 4;
  hover(-1);
  if (held.size === 2) {
    const [a, b] = [...held.values()], wide = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (pinch) zoom(wide / pinch, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    pinch = wide;
  } else if (poly.length) poly.push(world([x, y]));
  else if (moved) {
    view.x += x - px;
    view.y += y - py;
  }
  redraw();
});
function release(event) {
  if (!held.delete(event.pointerId) || held.size) return;
  const line = poly;
  poly = [];
  if (event.type === "pointerup" && !moved) {
    const i = nearest(...at(event), 12);
    if (i >= 0) look(i, canvas);
  } else if (event.type === "pointerup" && line.length > 2) {
    const before = event.shiftKey && selected ? selected : new Uint8Array(n), found = before.slice();
    for (let i = 0; i < n; i++) if ((!matches || matches[i]) && (only < 0 || place[i] === only) && inside(line, X[i], Y[i])) found[i] = 1;
    select(found);
  }
  redraw();
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", () => hover(-1));
canvas.addEventListener("wheel", (event) => {
  if (document.activeElement !== canvas && !event.ctrlKey) return; // else nobody could scroll past the map
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), ...at(event));
}, { passive: false });

const central = () => nearest(width / 2, height / 2, Math.hypot(width, height));
function hear() {
  const i = central();
  $("cross").textContent = i < 0 ? "No image here" : `${short(i)}, ${label(place[i])}`;
  crossed = true;
  if (i >= 0) hover(i, X[i] * view.s + view.x, Y[i] * view.s + view.y);
  redraw();
}
// With the keyboard one zooms on the image at the cross, so that there is always something to see.
function aim(by) {
  const i = central();
  if (i >= 0 && by > 1) move(width / 2 - X[i] * view.s - view.x, height / 2 - Y[i] * view.s - view.y);
  zoom(by);
}
const move = (dx, dy) => { view.x += dx; view.y += dy; };
const KEYS = {
  ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60), ArrowDown: () => move(0, -60),
  "+": () => aim(1.4), "=": () => aim(1.4), "-": () => aim(1 / 1.4), 0: fit,
  Enter: () => { const i = central(); if (i >= 0) look(i, canvas); },
  " ": () => {
    const i = central(), found = selected ? selected.slice() : new Uint8Array(n);
    if (i < 0) return;
    found[i] ^= 1;
    select(found);
  },
};
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
  if (event.key !== "Enter") hear();
});
canvas.addEventListener("blur", () => { crossed = false; hover(-1); redraw(); });

function mode(lasso) {
  lassoing = lasso;
  $("pan").setAttribute("aria-pressed", String(!lasso));
  $("lasso").setAttribute("aria-pressed", String(lasso));
  canvas.style.touchAction = lasso ? "none" : "pan-y"; // a finger can still scroll past the map
  hover(-1);
}
mode(false);
$("pan").onclick = () => mode(false);
$("lasso").onclick = () => mode(true);
$("in").onclick = () => zoom(1.6);
$("out").onclick = () => zoom(1 / 1.6);
$("all").onclick = fit;
$("view").onclick = () => {
  const found = new Uint8Array(n);
  for (const i of inView()) if ((!matches || matches[i]) && (only < 0 || place[i] === only)) found[i] = 1;
  select(found);
};

new ResizeObserver(() => {
  const first = !width, ratio = Math.min(2, devicePixelRatio || 1), mid = [width / 2, height / 2];
  width = canvas.clientWidth;
  height = canvas.clientHeight;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  if (!width) return;
  if (first || Math.abs(view.s - fitted) < 1e-6) fit();
  else { move(width / 2 - mid[0], height / 2 - mid[1]); if (n) draw(); }
}).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
