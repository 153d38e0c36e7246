// What an ONNX file says of itself, without reading the rest of it: ModelProto's field 14, metadata_props, of which each
// entry has a key (1) and a value (2). Encoding: https://protobuf.dev/programming-guides/encoding/
export function properties(bytes) {
  const found = {}, text = new TextDecoder();
  for (const [field, value] of fields(bytes)) {
    if (field !== 14) continue;
    const entry = Object.fromEntries(fields(value));
    found[text.decode(entry[1])] = text.decode(entry[2]);
  }
  return found;
}

// The fields of a message that hold bytes, as pairs [number, Uint8Array]; the others are passed over.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; at < bytes.length; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) break;
    }
    return value;
  };
  while (at < bytes.length) {
    const tag = varint(), kind = tag % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const size = varint();
      if (at + size > bytes.length) return;
      yield [Math.floor(tag / 8), bytes.subarray(at, at += size)];
    } else return;
  }
}
