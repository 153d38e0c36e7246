"use strict";
const canvas = document.createElement("canvas"), label = document.createElement("b");
let pinned = null, lit = null;

// The weights of a cubic enlargement of n places to so many pixels, as Pillow's BICUBIC has them: for each pixel, pairs
// [place, weight].
function taps(n, pixels) {
  return Array.from({ length: pixels }, (_, i) => {
    const centre = (i + 0.5) * n / pixels - 0.5, found = [];
    let sum = 0;
    for (let k = Math.max(0, Math.floor(centre) - 1); k <= Math.min(n - 1, Math.floor(centre) + 2); k++) {
      const x = Math.abs(centre - k);
      const w = x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
      found.push([k, w]);
      sum += w;
    }
    return found.map(([k, w]) => [k, w / sum]);
  });
}

// 0 to 1 a pixel, the strongest place near 1.
function light(grid, rows, columns, width, height) {
  const across = taps(columns, width), down = taps(rows, height), wide = new Float32Array(rows * width);
  for (let r = 0; r < rows; r++)
    for (let x = 0; x < width; x++)
      for (const [k, w] of across[x]) wide[r * width + x] += w * grid[r * columns + k];
  const full = new Float32Array(width * height);
  let most = 0;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      let value = 0;
      for (const [k, w] of down[y]) value += w * wide[k * width + x];
      full[y * width + x] = value = Math.max(0, value);
      most = Math.max(most, value);
    }
  return full.map(value => most ? value / most : 0);
}

// Where the model did not look, the photo is dark; where it looked, it is as it is, with a little warm light.
function paint(word) {
  const photo = word.closest("figure").querySelector(".photo"), image = photo.querySelector("img");
  const width = canvas.width = image?.naturalWidth || 320, height = canvas.height = image?.naturalHeight || 240;
  const [rows, columns] = word.parentNode.dataset.grid.split("x").map(Number);
  const grid = Uint8Array.from(atob(word.dataset.look), char => char.charCodeAt(0));
  const pixels = new Uint8ClampedArray(4 * width * height);
  light(grid, rows, columns, width, height).forEach((bright, i) => {
    const warm = 0.16 * bright, all = 1 - (1 - warm) * (1 - 0.74 * (1 - bright));
    pixels[4 * i] = 255 * warm / all;
    pixels[4 * i + 1] = 190 * warm / all;
    pixels[4 * i + 2] = 60 * warm / all;
    pixels[4 * i + 3] = 255 * all;
  });
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  label.textContent = word.textContent + " \u00b7 " + word.dataset.sure + "%";
  if (canvas.parentNode !== photo) photo.append(canvas, label);
}

function show(word) {
  if (word === lit) return;
  lit?.classList.remove("lit");
  lit = word;
  lit?.classList.add("lit");
  if (lit) paint(lit);
  else { canvas.remove(); label.remove(); }
}

function pin(word) {
  pinned?.removeAttribute("aria-pressed");
  pinned = word;
  pinned?.setAttribute("aria-pressed", "true");
  show(word);
}

const wordAt = event => event.target.closest?.("[data-look]") ?? null;
const keyed = () => document.activeElement.matches("[data-look]:focus-visible") ? document.activeElement : null;
addEventListener("pointerover", event => { if (wordAt(event)) show(wordAt(event)); });
addEventListener("pointerout", event => {
  const words = event.target.closest?.(".words");
  if (words && !words.contains(event.relatedTarget)) show(pinned ?? keyed());
});
addEventListener("click", event => {
  const word = wordAt(event);
  if (word || pinned) pin(word === pinned ? null : word);
});
addEventListener("focusin", event => {
  const word = wordAt(event);
  if (!word) return;
  for (const other of word.parentNode.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  word.tabIndex = 0;
  if (keyed()) show(word);
});
addEventListener("focusout", event => { if (!event.relatedTarget?.matches?.("[data-look]")) show(pinned); });
addEventListener("keydown", event => {
  if (event.key === "Escape") pin(null);
  const word = wordAt(event);
  if (!word || event.ctrlKey || event.altKey || event.metaKey) return;
  const words = [...word.parentNode.querySelectorAll("[data-look]")], here = words.indexOf(word);
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    pin(word === pinned ? null : word);
  }
  const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: words.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  words[next]?.focus({ focusVisible: true });
});

addEventListener("DOMContentLoaded", () => {
  const form = document.querySelector("form"), [search, sort] = form.elements, count = document.querySelector("output");
  // Accents do not matter, nor how a system stores them.
  const plain = text => " " + text.normalize("NFKD").replace(/\p{M}+/gu, "").toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, " ").trim();
  const number = (n, one, many) => n.toLocaleString("en") + " " + (n === 1 ? one : many);
  const photos = [...document.querySelectorAll("figure")].map(figure => ({
    figure,
    bad: figure.classList.contains("bad"),
    sure: Number(figure.querySelector("progress")?.getAttribute("value") ?? -1),
    text: plain([...figure.querySelectorAll(".words, .note, .name")].map(part => part.textContent).join(" ")),
  }));
  let order = "";
  function update() {
    const terms = plain(search.value).split(" ").filter(Boolean);
    let shown = 0, bad = 0;
    for (const photo of photos) {
      photo.figure.hidden = !terms.every(term => photo.text.includes(" " + term));
      if (!photo.figure.hidden) { shown++; bad += photo.bad; }
    }
    if (sort.value !== order) {
      const sign = { best: -1, worst: 1 }[sort.value] ?? 0;
      const sorted = [...photos].sort((a, b) => sign && (a.bad - b.bad || sign * (a.sure - b.sure)));
      const all = document.createDocumentFragment();
      for (const photo of sorted) all.append(photo.figure);
      document.body.append(all);
      order = sort.value;
    }
    const total = number(photos.length, "photo", "photos");
    count.value = (terms.length ? shown.toLocaleString("en") + " of " + total : total) +
      (bad ? ", " + bad.toLocaleString("en") + " without a caption" : "");
  }
  order = "given";
  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("submit", event => event.preventDefault());
  update();
});
