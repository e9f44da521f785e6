// What the page knows, and what its parts share. Text of a disk becomes text here, never markup.
const $ = (id) => document.getElementById(id);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const D = JSON.parse($("data").textContent);
const GALLERY = JSON.parse($("gallery").textContent), HEATS = JSON.parse($("heats").textContent);
const NONE = 0xffff;

function unpack(text, Kind) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
}
const place = unpack(D.cluster, Uint16Array), near = unpack(D.near, Uint16Array), far = unpack(D.far, Uint16Array);
const probability = unpack(D.probability, Uint8Array), confidence = unpack(D.confidence, Uint8Array);
const blank = new Set(D.blank);
const names = D.clusters.map((one) => one.name);

const path = (i) => D.prefix + D.paths[i];
const short = (i) => D.paths[i].slice(D.paths[i].lastIndexOf("/") + 1) || path(i);
const label = (c) => "Cluster " + D.clusters[c].id + (names[c] ? " · " + names[c] : "");
const number = (n) => n.toLocaleString("en");
const count = (n, what) => number(n) + " " + what + (n === 1 ? "" : "s");

function make(tag, given = {}, ...inside) {
  const one = document.createElement(tag);
  for (const [key, value] of Object.entries(given)) {
    if (key in one) one[key] = value;
    else one.setAttribute(key, value);
  }
  one.append(...inside);
  return one;
}
const button = (text, click) => make("button", { type: "button", onclick: click }, text);

function dot(c, one = make("i", { className: "dot" })) {
  one.style.background = `var(--p${D.clusters[c].colour})`;
  one.classList.add("s" + D.clusters[c].shape);
  return one;
}

const said = $("said");
let timer = 0;
function say(text) {
  said.textContent = text;
  clearTimeout(timer);
  timer = setTimeout(() => { said.textContent = ""; }, 6000);
}

async function copy(text, what) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text }), before = document.activeElement;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    before.focus({ preventScroll: true });
  }
  say(done ? "Copied " + what : "Your browser does not let this page copy");
}

function save(text, name) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
