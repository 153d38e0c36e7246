"""A bundle as one ONNX file: photos in, words out, with resizing and search inside. docs/one-graph.md describes it.

It is made of the bundle's own graphs, without TensorFlow and without the trained run. Any language that has ONNX
Runtime captions photos with one call of it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper

from caption_export.canonical import IR_VERSION, OPSET, PRODUCER
from caption_export.errors import ExportError, not_written
from caption_export.loops import Found, Searching, beam_search, greedy_search
from caption_export.weaving import Weaver, tensor_info
from caption_rt import __version__
from caption_rt._fields import Fields
from caption_rt.bundle import SELFTEST_FILE, Bundle, GraphSpec, TensorSpec
from caption_rt.caption import Caption
from caption_rt.captioner import Captioner
from caption_rt.engine import Graph
from caption_rt.errors import BundleError, CaptionError, Parameter, printable
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions

__all__ = [
    "FORMAT",
    "build_one_graph",
    "check_free",
    "one_graph_spec",
    "self_test_photos",
    "verify_one_graph",
    "write_one_graph",
]

FORMAT = "caption-graph 1"
"""What the file's property `format` says; it changes when inputs, outputs or properties do."""

_TOGETHER = 16  # photos that are compared at once: memory does not grow with their number
_TOLERANCES = {"fp32": 1e-3, "fp16": 0.05, "int8": 0.05}
"""By precision, how far a caption's log-probability may be from caption-rt's, which sums in another order."""


def one_graph_spec(bundle: Bundle) -> GraphSpec:
    """The inputs and outputs of a bundle's one graph: n photos, whose longest caption has w words."""
    rows, columns = bundle.manifest.grid.rows, bundle.manifest.grid.columns
    return GraphSpec(
        "caption.onnx",
        (TensorSpec("photos", "uint8", ("n", "height", "width", 3)),),
        (
            TensorSpec("tokens", "int64", ("n", "w")),
            TensorSpec("lengths", "int64", ("n",)),
            TensorSpec("words", "string", ("n", "w")),
            TensorSpec("log_prob", "float32", ("n",)),
            TensorSpec("word_log_probs", "float32", ("n", "w")),
            TensorSpec("attention", "float32", ("n", "w", rows, columns)),
            TensorSpec("ended", "bool", ("n",)),
        ),
    )


def build_one_graph(bundle: Bundle, options: DecodeOptions, precision: str) -> bytes:
    """Weave a bundle's graphs into one.

    Args:
        bundle: The bundle.
        options: Beam size, length penalty and longest length count; the rest of them a graph does not do.
        precision: One that the bundle has.

    Returns:
        The serialised ONNX model; the same bytes for the same arguments.

    Raises:
        ExportError: A graph of the bundle cannot be put inside another.
    """
    manifest, vocabulary, grid = bundle.manifest, bundle.vocabulary, bundle.manifest.grid
    specs = manifest.precisions[precision]
    models = {name: _parsed(bundle.read(spec.file), name) for name, spec in specs.items()}
    outer = Weaver()
    size = outer.int64(manifest.image.size, manifest.image.size)
    # Weights of what lies outside the photo are left out, as Pillow does, and not given to its edge.
    small = outer.add("Resize", "photos", "", "", size, mode="linear", antialias=1, exclude_outside=1, axes=[1, 2])
    seen = outer.inline(models["extractor"], "extractor/", {"images": small})
    encoded = outer.inline(models["encoder"], "encoder/", {"grid": seen["grid"]})
    searching = Searching(
        decoder=models["decoder"],
        features=encoded["features"],
        keys=encoded["keys"],
        state=encoded["initial_state"],
        max_words=outer.constant(options.max_words, "int64"),
        places=grid.rows * grid.columns,
        units=_units(bundle, precision),
        vocabulary=vocabulary,
    )
    greedy = options.beam_size == 1
    found = greedy_search(outer, searching) if greedy else beam_search(outer, searching, options)
    spec = one_graph_spec(bundle)
    for tensor, result in zip(spec.outputs, _results(outer, bundle, found), strict=True):
        outer.name(result, tensor.name)
    inputs, outputs = ([_info(tensor) for tensor in tensors] for tensors in (spec.inputs, spec.outputs))
    graph = outer.graph("caption", inputs, outputs)
    model = helper.make_model(
        graph, producer_name=PRODUCER, opset_imports=_operator_sets(models), ir_version=IR_VERSION
    )
    helper.set_model_props(model, _properties(bundle, options, precision))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ExportError(f"the one graph is not valid ONNX: {printable(exc)}") from exc
    return bytes(model.SerializeToString(deterministic=True))


def _parsed(data: bytes, name: str) -> ModelProto:
    try:
        return onnx.load_model_from_string(data)
    except Exception as exc:  # protobuf's errors have no common root below Exception
        raise ExportError(f"the {name} graph is not an ONNX model: {printable(exc)}") from exc


def _units(bundle: Bundle, precision: str) -> int:
    return next(
        int(tensor.shape[1])
        for tensor in bundle.manifest.precisions[precision]["decoder"].inputs
        if tensor.name == "state"
    )


def _info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return tensor_info(tensor.name, tensor.dtype, tensor.shape)


def _results(outer: Weaver, bundle: Bundle, found: Found) -> Sequence[str]:
    """The outputs in the order of `one_graph_spec`, cut after the longest caption."""
    grid, vocabulary = bundle.manifest.grid, bundle.vocabulary
    is_word = outer.add("Not", outer.add("Equal", found.tokens, outer.constant(vocabulary.pad_id, "int64")))
    lengths = outer.add("ReduceSum", outer.cast(is_word, "int64"), outer.int64(1), keepdims=0)
    longest = outer.add("ReduceMax", lengths)  # [1]

    def cut(tensor: str) -> str:
        return outer.add("Slice", tensor, outer.int64(0), longest, outer.int64(1))

    tokens = cut(found.tokens)
    texts = outer.constant(
        [word if i != vocabulary.pad_id else "" for i, word in enumerate(vocabulary.words)], "string"
    )
    count = outer.add("Shape", lengths)
    shape = outer.add("Concat", count, longest, outer.int64(grid.rows, grid.columns), axis=0)
    # A caption without a word has zero places, which must not be taken as "as many as before".
    attention = outer.add("Reshape", cut(found.attention), shape, allowzero=1)
    return (
        tokens,
        lengths,
        outer.add("Gather", texts, tokens),
        outer.cast(found.log_prob, "float32"),
        cut(found.word_log_probs),
        attention,
        found.ended,
    )


def _properties(bundle: Bundle, options: DecodeOptions, precision: str) -> dict[str, str]:
    """What the file says of itself: text, or JSON."""
    manifest = bundle.manifest
    facts = {
        "vocabulary": list(bundle.vocabulary.words),
        "special_ids": dict(sorted(manifest.special_ids.items())),
        "preprocessing": {
            "color": manifest.image.color,
            "layout": "photos, rows from the top, columns from the left, channels",
            "resize": manifest.image.resize,
            "antialias": True,
            "size": manifest.image.size,
            "in_graph": True,
        },
        "grid": {"rows": manifest.grid.rows, "columns": manifest.grid.columns},
        "decoding": {
            "beam_size": options.beam_size,
            "length_penalty": options.length_penalty,
            "max_words": options.max_words,
            "guard": False,
        },
        "versions": {**manifest.versions, "caption-rt": __version__, "onnx": onnx.__version__},
    }
    texts = {
        "format": FORMAT,
        "name": manifest.name,
        "description": manifest.description,
        "license": manifest.license,
        "precision": precision,
        "bundle_sha256": bundle.sha256,
    }
    return {**texts, **{name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}}


def _operator_sets(models: dict[str, ModelProto]) -> list[onnx.OperatorSetIdProto]:
    """ONNX's own set, and what else a graph needs.

    Raises:
        ExportError: A graph has another version of ONNX's own set.
    """
    versions = {"": OPSET}
    for name, model in models.items():
        for entry in model.opset_import:
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if versions.setdefault(domain, entry.version) != entry.version:
                raise ExportError(
                    f"the {name} graph has version {entry.version} of the operator set "
                    f"{printable(entry.domain or 'ai.onnx')}, and {versions[domain]} is needed"
                )
    return [helper.make_opsetid(domain, version) for domain, version in sorted(versions.items())]


def self_test_photos(bundle: Bundle) -> dict[str, NDArray[np.uint8]]:
    """The bundle's own test images, uint8 [S, S, 3], by name.

    Raises:
        BundleError: The bundle's self-test cannot be read.
        ImageError: One of them is not an image.
    """
    photos = {}
    for photo in Fields(bundle.selftest(), SELFTEST_FILE).inners("inputs"):
        try:
            png = base64.b64decode(photo.text("png_base64"), validate=True)
        except binascii.Error as exc:
            raise photo.error("png_base64", f"is not base64: {exc}") from exc
        photos[photo.text("name")] = read_photo(png, bundle.manifest.image.size)
    return photos


def verify_one_graph(
    data: bytes, bundle: Bundle, options: DecodeOptions, precision: str, photos: Mapping[str, NDArray[np.uint8]]
) -> None:
    """See that the one graph says what caption-rt says with the bundle, on the CPU.

    Args:
        data: The serialised model.
        bundle: The bundle it was made of.
        options: Those it was built with.
        precision: That it was built in.
        photos: uint8 [S, S, 3] by name.

    Raises:
        ExportError: Other words come, or log-probabilities that are too far off.
        EngineError: ONNX Runtime cannot run it.
    """
    graph = Graph(data, one_graph_spec(bundle), "cpu")
    names, pixels = list(photos), list(photos.values())
    with Captioner(bundle, "cpu", precision=precision) as captioner:
        for start in range(0, len(pixels), _TOGETHER):
            some = pixels[start : start + _TOGETHER]
            wanted = captioner.caption_pixels(some, options)
            tokens, lengths, _, log_probs, *_ = graph.run(np.stack(some))
            for row, caption in enumerate(wanted):
                found = tuple(tokens[row, : lengths[row]].tolist())
                _check_caption(names[start + row], caption, found, float(log_probs[row]), _TOLERANCES[precision])


def _check_caption(name: str, wanted: Caption, tokens: tuple[int, ...], log_prob: float, tolerance: float) -> None:
    """Hold what the one graph says of a photo against what caption-rt says.

    Raises:
        ExportError: They differ.
    """
    if tokens != wanted.tokens:
        raise ExportError(
            f"the one graph gives {printable(name)} the token ids {list(tokens)}, and caption-rt {list(wanted.tokens)}"
        )
    difference = abs(log_prob - wanted.log_prob)
    if not difference <= tolerance:
        raise ExportError(
            f"the one graph's log-probability of {printable(name)} is {difference:.2g} off from caption-rt's, and "
            f"{tolerance:g} is allowed"
        )


def check_free(path: Path, *, overwrite: bool) -> None:
    """See that a file may be written.

    Raises:
        BundleError: There is already a folder, or a file that is not to be replaced.
    """
    if path.is_dir():
        raise BundleError(f"{printable(path)} is a folder, and only a file is overwritten: name another")
    if os.path.lexists(path) and not overwrite:
        raise BundleError(
            f"{printable(path)} exists already: name another file, or replace it with ", Parameter("overwrite")
        )


def write_one_graph(data: bytes, path: Path, *, overwrite: bool = False) -> None:
    """Write the file: wholly, or not at all.

    Args:
        data: The serialised model.
        path: Where to.
        overwrite: Replace a file that is there.

    Raises:
        BundleError: There is already a folder, or a file that is not to be replaced.
        CaptionError: It cannot be written.
    """
    check_free(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as exc:
        raise CaptionError(not_written(path, exc)) from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
