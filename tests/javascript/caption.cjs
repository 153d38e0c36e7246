// Runs the one graph with onnxruntime-node: node caption.cjs caption.onnx photos.bin COUNT HEIGHT WIDTH
// photos.bin: RGB, uint8 [count, height, width, 3]. Prints the outputs as JSON, flat, each with its shape.
const { readFileSync } = require("node:fs");
const ort = require("onnxruntime-node");

async function main([model, photos, ...shape]) {
  const session = await ort.InferenceSession.create(model);
  const images = new ort.Tensor("uint8", new Uint8Array(readFileSync(photos)), [...shape.map(Number), 3]);
  const results = await session.run({ photos: images });
  const plain = Object.entries(results).map(([name, { type, dims, data }]) =>
    [name, { type, dims, data: Array.from(data, value => typeof value === "bigint" ? Number(value) : value) }]);
  console.log(JSON.stringify(Object.fromEntries(plain)));
}

main(process.argv.slice(2));
