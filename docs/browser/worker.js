// Runs the model, away from the page, which stays quick meanwhile.
import { properties } from "./properties.js";

const OUTPUTS = ["words", "lengths", "word_log_probs", "attention"];
let ort, session = null;

// Only the caption graph's own outputs are taken for it.
async function load(file) {
  session = null;
  let bytes;
  if (file) bytes = new Uint8Array(await file.arrayBuffer());
  else {
    const answer = await fetch(new URL("caption.onnx", import.meta.url)).catch(() => null);
    if (!answer?.ok) return { type: "missing", what: "model" };
    bytes = new Uint8Array(await answer.arrayBuffer());
  }
  const facts = properties(bytes);
  try {
    if (!facts.format?.startsWith("caption-graph 1")) throw new Error("no caption graph");
    session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  } catch (error) {
    console.info(error);
    session = null;
    return { type: "missing", what: "sense", name: file?.name ?? "caption.onnx" };
  }
  return { type: "ready", name: facts.name, license: facts.license, precision: facts.precision, size: bytes.length };
}

async function caption({ pixels, height, width, number }) {
  const start = performance.now(), images = new ort.Tensor("uint8", pixels, [1, height, width, 3]);
  const result = await session.run({ photos: images }, OUTPUTS);
  const words = result.words.data.slice(0, Number(result.lengths.data[0]));
  const [, , rows, columns] = result.attention.dims;
  return {
    type: "caption", number, words, rows, columns, seconds: (performance.now() - start) / 1000,
    logProbs: result.word_log_probs.data, attention: result.attention.data,
  };
}

onmessage = async ({ data }) => {
  try {
    if (!ort) {
      ort = await import("./ort/ort.wasm.min.mjs").catch(() => null);
      if (!ort) return postMessage({ type: "missing", what: "runtime" });
      ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
    }
    postMessage(data.type === "load" ? await load(data.file) : await caption(data));
  } catch (error) {
    console.info(error);
    postMessage({ type: "failed", number: data.number });
  }
};
postMessage({ type: "begun" });
