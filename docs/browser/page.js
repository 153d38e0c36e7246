// A photo is read here, captioned in worker.js, and shown with where the model looked for each word.
const MOST_PIXELS = 50e6; // four bytes each, and three more for the model
const find = selector => document.querySelector(selector);
const drop = find("#drop"), status = find("#status"), complaint = find("#error"), about = find("#about");
const result = find("#result"), image = find(".photo img"), canvas = find(".photo canvas"), label = find(".photo b");
const sentence = find(".words"), sure = find(".sure span"), bar = find("progress");
const MISSING = {
  model: "There is no model beside this page: put caption.onnx there, or choose one below.",
  runtime: "onnxruntime-web is missing: put its files into the folder ort beside this page, as docs/one-graph.md says.",
};

let worker = null, ready = false, number = 0, waiting = null, shown = null, pinned = null, lit = null, revealing = 0;

function say(text, busy = false) {
  status.textContent = text;
  status.classList.toggle("busy", busy);
}

function complain(text) {
  complaint.textContent = text ?? "";
  complaint.hidden = !text;
  if (text) say("");
}

// -- Reading a photo --------------------------------------------------------------------------------------------------

// The photo as the browser shows it: upright by its EXIF orientation, in sRGB, on white where it is transparent. At its own
// size, because the graph resizes as the model was trained to see it, and a canvas does not.
async function pixelsOf(file) {
  const photo = new Image();
  photo.src = URL.createObjectURL(file);
  try {
    await new Promise((done, failed) => { photo.onload = done; photo.onerror = failed; });
  } catch {
    URL.revokeObjectURL(photo.src);
    throw `${file.name} is not a photo that this browser can read: choose a JPEG, PNG or WebP.`;
  }
  const width = photo.naturalWidth, height = photo.naturalHeight, millions = Math.round(width * height / 1e6);
  try {
    if (width * height > MOST_PIXELS)
      throw `${file.name} has ${millions} megapixels, and this page reads up to ${MOST_PIXELS / 1e6}: scale it down first.`;
    if (!width || !height) throw `${file.name} has no size of its own: choose a photo.`; // SVG
    const surface = Object.assign(document.createElement("canvas"), { width, height });
    const pen = surface.getContext("2d", { willReadFrequently: true, alpha: false });
    if (!pen) throw null;
    pen.fillStyle = "white";
    pen.fillRect(0, 0, width, height);
    pen.drawImage(photo, 0, 0);
    const coloured = pen.getImageData(0, 0, width, height).data, pixels = new Uint8Array(3 * width * height);
    for (let from = 0, to = 0; to < pixels.length; from += 4) {
      pixels[to++] = coloured[from];
      pixels[to++] = coloured[from + 1];
      pixels[to++] = coloured[from + 2];
    }
    return { address: photo.src, pixels, width, height };
  } catch (reason) {
    URL.revokeObjectURL(photo.src);
    throw typeof reason === "string" ? reason
      : `${file.name} is too large for this browser (${millions} megapixels): scale it down first.`;
  }
}

async function take(file) {
  if (!file || !worker) return;
  const mine = ++number;
  complain();
  say("Reading the photo…", true);
  try {
    const photo = await pixelsOf(file);
    if (mine !== number) return URL.revokeObjectURL(photo.address);
    show(photo, file.name);
    waiting = { type: "caption", number: mine, pixels: photo.pixels, width: photo.width, height: photo.height };
    send();
  } catch (reason) {
    if (mine === number) complain(String(reason));
  }
}

function send() {
  if (!waiting) return;
  if (!ready) {
    if (!complaint.hidden) return;
    return say("Waiting for the model…", true);
  }
  say("Looking at the photo…", true);
  worker.postMessage(waiting, [waiting.pixels.buffer]);
  waiting = null;
}

// -- Showing it -------------------------------------------------------------------------------------------------------

function show(photo, name) {
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = photo.address;
  image.alt = name;
  result.hidden = false;
  drop.classList.add("small");
  shown = null;
  pinned = lit = null;
  clearTimeout(revealing);
  light(null);
  sentence.replaceChildren();
  for (const part of [find(".sure"), find(".hint")]) part.hidden = true;
}

function tell({ words, logProbs, attention, rows, columns, seconds }) {
  shown = { words, logProbs, attention, rows, columns };
  const text = words.join(" ");
  image.alt = text;
  sentence.replaceChildren(...words.flatMap((word, index) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: word });
    button.tabIndex = index ? -1 : 0;
    button.setAttribute("aria-pressed", "false");
    return [button, " "];
  }));
  if (!words.length) sentence.textContent = "(no words)";
  const confidence = words.length
    ? Math.exp(logProbs.slice(0, words.length).reduce((a, b) => a + b) / words.length) : 0;
  sure.textContent = `Confidence ${Math.round(100 * confidence)}%`;
  bar.value = confidence;
  for (const part of [find(".sure"), find(".hint")]) part.hidden = !words.length;
  say(`Done in ${seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`}.`);
  // For those who hear the page; the others see it below.
  status.append(Object.assign(document.createElement("span"), { className: "heard", textContent: ` ${text}` }));
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) reveal();
}

// Word by word, as they were said; anything that the reader does ends it.
function reveal() {
  const words = [...sentence.children];
  for (const word of words) word.classList.add("coming");
  const next = index => {
    words[index]?.classList.remove("coming");
    light(words[index] ?? null);
    if (index < words.length) revealing = setTimeout(next, 380, index + 1);
  };
  next(0);
}

function settle() {
  clearTimeout(revealing);
  for (const word of sentence.children) word.classList.remove("coming");
}

// The weights of a cubic enlargement of n places to so many pixels, as Pillow's BICUBIC has them: for each pixel, pairs
// [place, weight]. Also in caption_rt/gallery.js: both pages stand alone; a test holds the two to be the same.
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

// Where the model did not look, the photo is dark; where it looked, it is as it is, with a little warm light.
function paint(index) {
  const { attention, rows, columns } = shown, grid = attention.subarray(index * rows * columns);
  const width = canvas.width = 320;
  const height = canvas.height = Math.min(960, Math.max(1, Math.round(width * image.naturalHeight / image.naturalWidth)));
  const across = taps(columns, width), down = taps(rows, height), full = new Float32Array(width * height);
  let most = 0;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      let value = 0;
      for (const [r, v] of down[y]) for (const [c, w] of across[x]) value += v * w * grid[r * columns + c];
      full[y * width + x] = value = Math.max(0, value);
      most = Math.max(most, value);
    }
  const pixels = new Uint8ClampedArray(4 * width * height);
  full.forEach((value, i) => {
    const bright = most ? value / most : 0, warm = 0.16 * bright, all = 1 - (1 - warm) * (1 - 0.74 * (1 - bright));
    pixels[4 * i] = 255 * warm / all;
    pixels[4 * i + 1] = 190 * warm / all;
    pixels[4 * i + 2] = 60 * warm / all;
    pixels[4 * i + 3] = 255 * all;
  });
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  label.textContent = `${shown.words[index]} · ${Math.round(100 * Math.exp(shown.logProbs[index]))}%`;
}

function light(word) {
  if (word === lit && word) return;
  lit?.classList.remove("lit");
  lit = word;
  lit?.classList.add("lit");
  canvas.hidden = label.hidden = !word;
  if (word) paint([...sentence.children].indexOf(word));
}

function pin(word) {
  settle();
  pinned?.setAttribute("aria-pressed", "false");
  pinned = word;
  pinned?.setAttribute("aria-pressed", "true");
  light(word);
}

const wordAt = event => event.target.closest?.(".words button") ?? null;
const focused = () => document.activeElement.matches(".words button:focus-visible") ? document.activeElement : null;
sentence.addEventListener("pointerover", event => {
  if (event.pointerType === "touch" || !wordAt(event)) return;
  settle();
  light(wordAt(event));
});
sentence.addEventListener("pointerleave", () => { settle(); light(pinned ?? focused()); });
addEventListener("click", event => {
  const word = wordAt(event);
  if (word) pin(word === pinned ? null : word);
  else if (pinned && !event.target.closest("label, input")) pin(null);
});
sentence.addEventListener("focusin", event => {
  for (const other of sentence.children) other.tabIndex = other === event.target ? 0 : -1;
  if (focused()) { settle(); light(event.target); }
});
sentence.addEventListener("focusout", event => { if (!sentence.contains(event.relatedTarget)) light(pinned); });
addEventListener("keydown", event => {
  if (event.key === "Escape") return pin(null);
  const word = wordAt(event);
  if (!word || event.ctrlKey || event.altKey || event.metaKey) return;
  const words = [...sentence.children], here = words.indexOf(word);
  const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: words.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  words[next]?.focus({ focusVisible: true });
});

// -- Files ------------------------------------------------------------------------------------------------------------

function load(file) {
  if (!worker) return;
  ready = false;
  complain();
  about.textContent = "";
  say("Loading the model…", true);
  worker.postMessage({ type: "load", file });
}

function give(file) {
  if (file?.name.toLowerCase().endsWith(".onnx")) load(file);
  else take(file);
}

for (const [selector, use] of [["#photo", take], ["#model", load]])
  find(selector).addEventListener("change", event => {
    const [file] = event.target.files;
    if (file) use(file);
    event.target.value = ""; // so that the same file may be chosen again
  });
// A file that misses the frame must not replace the page.
addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) document.body.classList.remove("over"); });
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) give(file);
  else complain("That is no file: drop a photo from a folder.");
});

function begin() {
  if (typeof WebAssembly !== "object" || typeof BigInt64Array !== "function")
    return complain("This browser has no WebAssembly, in which the model runs: use a newer one, or allow it.");
  const source = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  worker = new Worker(address, { type: "module" });
  worker.onerror = () => complain("The part of this page that runs the model cannot be loaded: open the page from a web server.");
  worker.onmessage = ({ data }) => {
    if (data.type === "begun") { URL.revokeObjectURL(address); load(); }
    else if (data.type === "ready") {
      ready = true;
      say("");
      about.textContent =
        `Model: ${data.name}, ${data.precision}, ${(data.size / 1e6).toFixed(0)} MB. Licence: ${data.license}.`;
      send();
    } else if (data.type === "missing") {
      complain(MISSING[data.what] ?? `${data.name} is not a model of this page's kind: caption-export graph makes one.`);
    } else if (data.number !== number) return; // of a photo before
    else if (data.type === "caption") tell(data);
    else complain("The model failed on this photo: there may be too little memory, so try a smaller one.");
  };
  drop.hidden = false;
}
begin();
