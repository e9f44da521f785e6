// The map on its canvas. World: both axes in [0, 1] at one scale. Screen: world * view.s + (view.x, view.y), CSS pixels.
const canvas = $("canvas"), pen = canvas.getContext("2d"), spots = unpack(D.xy, Uint16Array);
const n = spots.length / 2, X = new Float32Array(n), Y = new Float32Array(n);
for (let i = 0; i < n; i++) { X[i] = spots[2 * i] / 65535; Y[i] = spots[2 * i + 1] / 65535; }
const view = { s: 1, x: 0, y: 0 };
let width = 0, height = 0, fitted = 1, waiting = false, only = -1, crossed = false, poly = [], matches = null, selected = null;
const lit = (i) => (!matches || matches[i]) && (only < 0 || place[i] === only) && (!selected || selected[i]);

const members = D.clusters.map(() => []);
for (let i = 0; i < n; i++) members[place[i]].push(i);
const middle = members.map((own) => {
  const half = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  return own.length ? [half(own.map((i) => X[i])), half(own.map((i) => Y[i]))] : null;
});

// Points by cell of a grid, to find the one under a pointer.
const CELLS = 96, cell = (v) => Math.max(0, Math.min(CELLS - 1, Math.floor(v * CELLS)));
const starts = new Uint32Array(CELLS * CELLS + 1), byCell = new Uint32Array(n);
for (let i = 0; i < n; i++) starts[cell(Y[i]) * CELLS + cell(X[i]) + 1]++;
for (let c = 0; c < CELLS * CELLS; c++) starts[c + 1] += starts[c];
const next = starts.slice();
for (let i = 0; i < n; i++) byCell[next[cell(Y[i]) * CELLS + cell(X[i])]++] = i;

function nearest(px, py, within) {
  const x = (px - view.x) / view.s, y = (py - view.y) / view.s, r = within / view.s;
  let best = -1, least = r * r;
  for (let row = cell(y - r); row <= cell(y + r); row++) {
    const from = starts[row * CELLS + cell(x - r)], to = starts[row * CELLS + cell(x + r) + 1];
    for (let k = from; k < to; k++) {
      const i = byCell[k], d = (X[i] - x) ** 2 + (Y[i] - y) ** 2;
      if (d <= least && lit(i)) { best = i; least = d; }
    }
  }
  return best;
}

function fit() {
  fitted = view.s = Math.max(10, Math.min(width, height) - 56);
  view.x = (width - view.s) / 2;
  view.y = (height - view.s) / 2;
  redraw();
}

function zoom(by, px = width / 2, py = height / 2) {
  const s = Math.max(fitted / 2, Math.min(fitted * 400, view.s * by)), ratio = s / view.s;
  view.x = px - (px - view.x) * ratio;
  view.y = py - (py - view.y) * ratio;
  view.s = s;
  redraw();
}

function visit(i) {
  view.s = Math.max(view.s, fitted * 6);
  view.x = width / 2 - X[i] * view.s;
  view.y = height / 2 - Y[i] * view.s;
  redraw();
}

function redraw() {
  if (waiting || !n) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

const inView = () => {
  const found = [], margin = 8;
  for (let i = 0; i < n; i++) {
    const x = X[i] * view.s + view.x, y = Y[i] * view.s + view.y;
    if (x > -margin && y > -margin && x < width + margin && y < height + margin) found.push(i);
  }
  return found;
};

// Share of the images that have a square of this side for themselves: pictures that cover each other show nothing.
function spread(ids, side) {
  const cells = new Set(ids.map((i) => Math.floor((X[i] * view.s) / side) + 1e6 * Math.floor((Y[i] * view.s) / side)));
  return cells.size / Math.max(1, ids.length);
}

// Where points are dense, one of each square is shown as a picture: those in squares that hold a few at least.
function peaks(ids) {
  const squares = new Map(), side = 84;
  for (const i of ids) {
    const x = (X[i] * view.s) / side, y = (Y[i] * view.s) / side, key = Math.floor(x) + 1e6 * Math.floor(y);
    const off = Math.hypot((x % 1) - 0.5, (y % 1) - 0.5), best = squares.get(key) || [0, i, off];
    squares.set(key, off < best[2] ? [best[0] + 1, i, off] : [best[0] + 1, best[1], best[2]]);
  }
  return [...squares.values()].filter((one) => one[0] > 4 && !blank.has(one[1])).map((one) => one[1]);
}

function thumb(i, x, y, side) {
  pen.fillStyle = colours[D.clusters[place[i]].colour];
  pen.fillRect(x - side / 2 - 2, y - side / 2 - 2, side + 4, side + 4);
  tile(pen, i, x - side / 2, y - side / 2, side, redraw);
}

let colours = [];
function draw() {
  const style = getComputedStyle(document.body), ink = style.getPropertyValue("--ink"), card = style.getPropertyValue("--card");
  colours = Array.from({ length: 8 }, (_, c) => style.getPropertyValue("--p" + c));
  const ratio = canvas.width / width, there = inView(), on = there.filter(lit);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const r = Math.min(7, Math.max(1.1, Math.min(5, Math.sqrt((width * height) / n) * 0.12)) * Math.sqrt(view.s / fitted));
  if (on.length < there.length) {
    pen.fillStyle = style.getPropertyValue("--dim");
    for (const i of there) if (!lit(i)) mark(0, X[i] * view.s + view.x, Y[i] * view.s + view.y, Math.min(r, 2));
  }
  const groups = new Map();
  for (const i of on) {
    if (!groups.has(place[i])) groups.set(place[i], []);
    groups.get(place[i]).push(i);
  }
  const side = Math.max(20, Math.min(64, 0.5 * Math.sqrt((width * height) / Math.max(1, on.length))));
  const tiles = D.tile && on.length <= 300 && spread(on, side) > 0.45;
  pen.strokeStyle = card; // so that points that touch stay apart
  pen.lineWidth = 1;
  for (const [c, own] of groups) {
    pen.fillStyle = colours[D.clusters[c].colour];
    for (const i of own) {
      const x = X[i] * view.s + view.x, y = Y[i] * view.s + view.y;
      if (!tiles || blank.has(i)) mark(D.clusters[c].shape, x, y, r);
      else thumb(i, x, y, side);
    }
  }
  if (!tiles && D.tile && view.s > 2.5 * fitted) for (const i of peaks(on)) thumb(i, X[i] * view.s + view.x, Y[i] * view.s + view.y, 40);
  if (!tiles) labels(groups, ink, card);
  pen.strokeStyle = ink;
  pen.lineWidth = 1.5;
  if (poly.length > 1) {
    pen.setLineDash([5, 4]);
    pen.beginPath();
    for (const [x, y] of poly) pen.lineTo(x * view.s + view.x, y * view.s + view.y);
    pen.closePath();
    pen.stroke();
    pen.setLineDash([]);
  }
  if (crossed) {
    pen.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      pen.moveTo(width / 2 + 5 * dx, height / 2 + 5 * dy);
      pen.lineTo(width / 2 + 14 * dx, height / 2 + 14 * dy);
    }
    pen.stroke();
  }
  canvas.dataset.view = [view.s, view.x, view.y].map((v) => v.toFixed(3)).join(" ");
}

// Disc, square, diamond, triangle: clusters of one colour differ by it.
function mark(kind, x, y, r) {
  if (r < 2 || kind === 1) pen.fillRect(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r);
  else {
    pen.beginPath();
    if (kind === 0) pen.arc(x, y, r, 0, 7);
    else {
      pen.moveTo(x, y - 1.25 * r);
      pen.lineTo(x + 1.25 * r, kind === 2 ? y : y + r);
      if (kind === 2) pen.lineTo(x, y + 1.25 * r);
      pen.lineTo(x - 1.25 * r, kind === 2 ? y : y + r);
    }
    pen.fill();
    if (r > 3) pen.stroke();
  }
}

function labels(groups, ink, card) {
  const taken = [];
  pen.font = "600 12px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  for (let c = 0; c < Math.min(40, D.clusters.length); c++) {
    if (!groups.has(c)) continue;
    const text = names[c] ? names[c].slice(0, 24) : String(D.clusters[c].id), half = pen.measureText(text).width / 2 + 3;
    const x = middle[c][0] * view.s + view.x, y = middle[c][1] * view.s + view.y;
    if (taken.some(([a, b, h]) => Math.abs(a - x) < h + half && Math.abs(b - y) < 16)) continue;
    taken.push([x, y, half]);
    pen.strokeStyle = card;
    pen.lineWidth = 4;
    pen.strokeText(text, x, y);
    pen.fillStyle = ink;
    pen.fillText(text, x, y);
  }
}
