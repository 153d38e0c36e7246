"""What is in a bundle, for a person and for a program. Neither TensorFlow nor ONNX is needed; with ONNX it is more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from caption_export.stated import measured_scores
from caption_rt._amounts import byte_count
from caption_rt.bundle import MANIFEST_FILE, Bundle, TensorSpec
from caption_rt.errors import BundleError, printable, shown

_OPERATORS = 5  # kinds that the table names, the most frequent first


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """The facts about an open bundle, as values that `json.dumps` takes.

    Returns:
        Under ``precisions``, by precision and graph, what a graph is; ``nodes``, ``operators`` (how many nodes of each
        kind) and ``opset`` are None where the package onnx is not installed. Under ``files`` every file with its size
        in bytes and its SHA-256. Under ``measured`` what `caption_export.stated.measured_scores` gives. The rest is as
        in the manifest.

    Raises:
        BundleError: A file has changed since the bundle was opened, the package onnx cannot read a graph, or
            ``verification.json`` is not what an export writes.
    """
    manifest = bundle.manifest
    facts = manifest.to_json()
    precisions = {
        precision: {
            name: {
                "file": graph.file,
                **facts["files"][graph.file],
                "inputs": {tensor.name: _tensor(tensor) for tensor in graph.inputs},
                "outputs": {tensor.name: _tensor(tensor) for tensor in graph.outputs},
                **_operators(graph.file, bundle.read(graph.file)),
            }
            for name, graph in graphs.items()
        }
        for precision, graphs in manifest.precisions.items()
    }
    return {
        "path": str(bundle.path),
        "sha256": bundle.sha256,
        "size": sum(spec.size for spec in manifest.files.values()) + len(bundle.read(MANIFEST_FILE)),
        "words": len(bundle.vocabulary),
        **{name: value for name, value in facts.items() if name not in ("precisions", "files")},
        "measured": measured_scores(bundle),
        "precisions": precisions,
        "files": facts["files"],
    }


def bundle_json(facts: Mapping[str, Any]) -> str:
    """The facts for a program, as one JSON object.

    Args:
        facts: From `describe_bundle`.

    Raises:
        BundleError: The manifest has a number that is too large for a float.
    """
    try:
        return json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as exc:
        raise BundleError(
            f"the bundle {printable(facts['path'])}: {MANIFEST_FILE} has a number that no float can hold: export the "
            "model again"
        ) from exc


def bundle_table(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts for a person, line by line.

    Args:
        facts: From `describe_bundle`.
    """
    yield f"{shown(facts['name'])}: {shown(facts['description'])}"
    image, grid, decoding = facts["image"], facts["grid"], facts["decoding"]
    yield from _columns(
        [
            ["bundle", f"{printable(facts['path'])}, format {facts['format_version']}, {byte_count(facts['size'])}"],
            ["sha256", facts["sha256"]],
            ["licence", shown(facts["license"])],
            ["photo", f"{image['size']}x{image['size']} pixels, a grid of {grid['rows']}x{grid['columns']} places"],
            ["words", f"{facts['words']}, captions of {decoding['max_words']} at most"],
            ["decoding", f"beam of {decoding['beam_size']}, length penalty {decoding['length_penalty']:g}"],
            ["state", facts["recurrence"]],
            ["made with", shown(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))],
        ]
    )
    yield ""
    rows = [["precision", "graph", "file", "size", "nodes", "operators"]]
    for precision, graphs in facts["precisions"].items():
        for name, graph in graphs.items():
            nodes = "-" if graph["nodes"] is None else str(graph["nodes"])
            rows.append([precision, name, graph["file"], byte_count(graph["size"]), nodes, _most(graph["operators"])])
    yield from _columns(rows)
    yield ""
    yield "scores of the run, in TensorFlow"
    yield from _columns([*_scores(facts["scores"])] or [["none are stated"]])
    if facts["measured"]:
        yield ""
        yield "scores by precision, in ONNX Runtime"
        yield from _columns([*_scores(facts["measured"])])
    yield ""
    rows = [[name, str(spec["size"]), spec["sha256"]] for name, spec in facts["files"].items()]
    yield from _columns([["file", "bytes", "sha256"], *rows])


def _operators(file: str, data: bytes) -> dict[str, Any]:
    try:
        import onnx

        from caption_export.canonical import operators
    except ModuleNotFoundError:
        return {"opset": None, "nodes": None, "operators": None}
    try:
        model = onnx.load_model_from_string(data)
    except Exception as exc:  # protobuf's errors have no common root below Exception
        raise BundleError(f"{file} cannot be read as ONNX: {printable(exc)}; export the model again") from exc
    found = operators(model)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    return {"opset": opsets, "nodes": sum(found.values()), "operators": found}


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _most(operators: Mapping[str, int] | None) -> str:
    if operators is None:
        return "- (with the package onnx)"
    ordered = sorted(operators.items(), key=lambda item: -item[1])
    rest = sum(count for _, count in ordered[_OPERATORS:])
    named = [f"{count} {shown(name)}" for name, count in ordered[:_OPERATORS]]
    return ", ".join([*named, f"{rest} others"] if rest else named)


def _scores(scores: Mapping[str, Any], above: str = "") -> Iterator[list[str]]:
    """A row a number, whatever the export nested them in."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _scores(value, f"{above}{name} ")
        else:
            yield [shown(above), shown(name), f"{value:g}" if isinstance(value, float) else shown(value)]


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
