"""The facts about a bundle, as its ``manifest.json`` states them: one frozen type an object, strictly read.

Programs import these names from `caption_rt.bundle`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from caption_rt._fields import Fields
from caption_rt.errors import BundleError, printable

__all__ = [
    "FORMAT_VERSION",
    "GRAPH_TENSORS",
    "MANIFEST_FILE",
    "PRECISIONS",
    "SELFTEST_FILE",
    "VOCABULARY_FILE",
    "DecodingSpec",
    "FileSpec",
    "GraphSpec",
    "GridSpec",
    "ImageSpec",
    "Manifest",
    "OtherFormat",
    "TensorSpec",
    "check_file_name",
]

FORMAT_VERSION = 1
"""The format that this version writes, and the only one that it reads."""

MANIFEST_FILE = "manifest.json"
VOCABULARY_FILE = "vocabulary.json"
SELFTEST_FILE = "selftest.json"

GRAPH_TENSORS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "extractor": (("images",), ("grid",)),
    "encoder": (("grid",), ("features", "keys", "initial_state")),
    "decoder": (("token", "state", "features", "keys"), ("log_probs", "next_state", "attention")),
}
"""The three graphs, each with the names of its inputs and outputs, in the order in which a manifest lists them."""

PRECISIONS = ("fp32", "fp16", "int8")
"""The precisions that the three graphs may be there in. At the graphs' edges it is float32 in all of them."""

# ONNX is a protobuf file, and protobuf ends at 2 GiB: a larger size is a mistake or an attack.
MAX_FILE_SIZE = 2**31
_MAX_OTHER_SIZE = 2**26  # of what is no graph: words, small images, text
_MAX_SIZE = 2**32  # of all files together
_MAX_FILES = 100

_DTYPES = ("uint8", "float32", "int64")
_FILE_NAME = re.compile(r"(?=.{1,100}$)[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.)")
# Windows opens a device under these names, whatever follows after a dot.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class OtherFormat(BundleError):
    """A bundle that is whole, but of another format."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    """The tensor's name in the graph."""
    dtype: str
    """uint8, float32 or int64."""
    shape: tuple[int | str, ...]
    """Sizes of its axes; the first is a name ("n", "m"), because the batch may have any size."""

    @classmethod
    def from_fields(cls, fields: Fields) -> "TensorSpec":
        """Read one from its JSON object; raises BundleError."""
        axes = fields.items("shape")
        if not axes or not isinstance(axes[0], str) or not axes[0]:
            raise fields.error("shape", "does not begin with the name of the batch axis")
        if not all(isinstance(axis, int) and not isinstance(axis, bool) and axis > 0 for axis in axes[1:]):
            raise fields.error("shape", "has an axis that is not a whole number above 0")
        return cls(fields.text("name"), fields.choice("dtype", _DTYPES), tuple(axes))

    def to_json(self) -> dict[str, Any]:
        """Its JSON object."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph: its file and its tensors."""

    file: str
    """Name of the file in the bundle."""
    inputs: tuple[TensorSpec, ...]
    """In the order of `GRAPH_TENSORS`."""
    outputs: tuple[TensorSpec, ...]
    """In the order of `GRAPH_TENSORS`."""

    @classmethod
    def from_fields(cls, fields: Fields) -> "GraphSpec":
        """Read one from its JSON object; raises BundleError."""
        return cls(
            fields.text("file"),
            tuple(TensorSpec.from_fields(tensor) for tensor in fields.inners("inputs")),
            tuple(TensorSpec.from_fields(tensor) for tensor in fields.inners("outputs")),
        )

    def to_json(self) -> dict[str, Any]:
        """Its JSON object."""
        return {
            "file": self.file,
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
        }


@dataclass(frozen=True)
class FileSpec:
    """What a file of the bundle must be."""

    sha256: str
    """SHA-256 of its bytes, 64 hexadecimal digits in lower case."""
    size: int
    """Its length in bytes."""

    @classmethod
    def from_fields(cls, fields: Fields) -> "FileSpec":
        """Read one from its JSON object; raises BundleError."""
        sha256 = fields.text("sha256")
        if not _SHA256.fullmatch(sha256):
            raise fields.error("sha256", "is not 64 hexadecimal digits in lower case")
        size = fields.integer("size")
        if size > MAX_FILE_SIZE:
            raise fields.error("size", f"is above {MAX_FILE_SIZE} bytes")
        return cls(sha256, size)

    def to_json(self) -> dict[str, Any]:
        """Its JSON object."""
        return {"sha256": self.sha256, "size": self.size}


@dataclass(frozen=True)
class ImageSpec:
    """How a photo becomes the extractor's input."""

    size: int
    """Pixels on each side of the square."""
    resize: str = "bilinear"
    """The filter: Pillow's bilinear, the only one so far."""
    color: str = "RGB"
    """Order of the channels, the only one so far."""


@dataclass(frozen=True)
class GridSpec:
    """The grid of places that the extractor sees in a photo."""

    rows: int
    """Places from top to bottom."""
    columns: int
    """Places from left to right; place p of a graph's axis P is row p // columns, column p % columns."""
    channels: int
    """Numbers that describe one place."""


@dataclass(frozen=True)
class DecodingSpec:
    """How this model decodes when the caller does not say otherwise; see `caption_rt.DecodeOptions`."""

    beam_size: int
    """Hypotheses kept a photo; 1 is greedy."""
    length_penalty: float
    """The exponent alpha of Wu et al. 2016, equation 14; 0 leaves sums of log-probabilities as they are."""
    max_words: int
    """A caption is cut after this many words."""


@dataclass(frozen=True)
class Manifest:
    """All facts about a bundle.

    Raises:
        BundleError: the facts contradict each other (shapes, names, files, special ids).
    """

    name: str
    """Short name of the model."""
    description: str
    """What it is, in a sentence or two."""
    license: str
    """The licence of the weights: an SPDX identifier, or a sentence where there is none."""
    files: Mapping[str, FileSpec]
    """Every file of the bundle but the manifest itself, by name."""
    precisions: Mapping[str, Mapping[str, GraphSpec]]
    """By precision, one at least of `PRECISIONS`, the three graphs: extractor, encoder, decoder. Their tensors are the
    same in each; precisions may share files."""
    image: ImageSpec
    """How a photo is read."""
    grid: GridSpec
    """What the extractor gives."""
    recurrence: str
    """"carry": the GRU's state goes on from word to word; "reset": it starts anew, as in the tutorial's code."""
    special_ids: Mapping[str, int]
    """Token ids of pad, unk, start and end."""
    decoding: DecodingSpec
    """How it decodes by default."""
    training: Mapping[str, Any]
    """How and on what the model was trained."""
    scores: Mapping[str, Any]
    """Its scores, with the split and the decoding they were measured with."""
    versions: Mapping[str, str]
    """The versions of the packages that made it."""
    format_version: int = FORMAT_VERSION
    """The format of the bundle."""

    def __post_init__(self) -> None:
        """Check what can be checked without the files."""
        graphs = [graph for of_precision in self.precisions.values() for graph in of_precision.values()]
        for required in (VOCABULARY_FILE, SELFTEST_FILE, *(graph.file for graph in graphs)):
            if required not in self.files:
                raise BundleError(f"manifest.json: files does not list {printable(required)}")
        _check_files(self.files)
        _check_tensors(self)

    @classmethod
    def from_json(cls, data: object) -> "Manifest":
        """The manifest of a ``manifest.json`` object.

        Raises:
            BundleError: another format version, or a key that is missing, of the wrong type, or contradicts another.
        """
        fields = Fields(data, MANIFEST_FILE)
        version = fields.integer("format_version")
        if version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            what = (
                "pip install -U caption-rt brings a newer one, which is needed" if newer else "export the model again"
            )
            raise OtherFormat(
                f"manifest.json: the bundle has format {version} and this caption-rt reads {FORMAT_VERSION}: {what}"
            )
        image, grid = fields.inner("image"), fields.inner("grid")
        files, ids, decoding = fields.inner("files"), fields.inner("special_ids"), fields.inner("decoding")
        versions = fields.inner("versions")
        return cls(
            name=fields.text("name"),
            description=fields.text("description"),
            license=fields.text("license"),
            files={name: FileSpec.from_fields(files.inner(name)) for name in files.names()},
            precisions=_precisions(fields.inner("precisions")),
            image=ImageSpec(
                image.integer("size", 1), image.choice("resize", ("bilinear",)), image.choice("color", ("RGB",))
            ),
            grid=GridSpec(grid.integer("rows", 1), grid.integer("columns", 1), grid.integer("channels", 1)),
            recurrence=fields.choice("recurrence", ("carry", "reset")),
            special_ids={name: ids.integer(name) for name in ("pad", "unk", "start", "end")},
            decoding=DecodingSpec(
                decoding.integer("beam_size", 1), decoding.number("length_penalty"), decoding.integer("max_words", 1)
            ),
            training=fields.mapping("training"),
            scores=fields.mapping("scores"),
            versions={name: versions.text(name) for name in versions.names()},
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``manifest.json``."""
        return {
            "format_version": self.format_version,
            "name": self.name,
            "description": self.description,
            "license": self.license,
            "image": {"size": self.image.size, "resize": self.image.resize, "color": self.image.color},
            "grid": {"rows": self.grid.rows, "columns": self.grid.columns, "channels": self.grid.channels},
            "recurrence": self.recurrence,
            "special_ids": dict(self.special_ids),
            "decoding": {
                "beam_size": self.decoding.beam_size,
                "length_penalty": self.decoding.length_penalty,
                "max_words": self.decoding.max_words,
            },
            "precisions": {
                precision: {name: graph.to_json() for name, graph in self.precisions[precision].items()}
                for precision in PRECISIONS
                if precision in self.precisions
            },
            "training": dict(self.training),
            "scores": dict(self.scores),
            "versions": dict(self.versions),
            "files": {name: self.files[name].to_json() for name in sorted(self.files)},
        }


def check_file_name(name: str) -> None:
    """Refuse a name that could lead out of the bundle's folder, or that some system reads differently.

    Raises:
        BundleError: the name is not letters, digits, ".", "_" and "-" alone, or is the manifest's own or a device's.
    """
    if not _FILE_NAME.fullmatch(name) or _DEVICE.fullmatch(name) or name.lower() == MANIFEST_FILE:
        raise BundleError(f"manifest.json: {printable(name)!r} is not the name of a file inside the bundle")


def _check_files(files: Mapping[str, FileSpec]) -> None:
    """Names that stay inside and apart on every system, and sizes that a bundle can have.

    Raises:
        BundleError: there is a file with another.
    """
    if len(files) > _MAX_FILES:
        raise BundleError(f"manifest.json: files lists {len(files)}, and a bundle has {_MAX_FILES} at most")
    lowered: dict[str, str] = {}
    for name, spec in files.items():
        check_file_name(name)
        # Not every system tells them apart.
        if other := lowered.get(name.lower()):
            raise BundleError(f"manifest.json: the names of the files {other} and {name} differ in capitals alone")
        lowered[name.lower()] = name
        if spec.size > _MAX_OTHER_SIZE and not name.endswith(".onnx"):
            raise BundleError(
                f"manifest.json: files: {name}: size is above {_MAX_OTHER_SIZE} bytes, and it is no graph"
            )
    total = sum(spec.size for spec in files.values())
    if total > _MAX_SIZE:
        raise BundleError(
            f"manifest.json: files have {total} bytes together, and those of a bundle {_MAX_SIZE} at most"
        )


def _precisions(fields: Fields) -> dict[str, dict[str, GraphSpec]]:
    """The graphs by precision, in the order of `PRECISIONS`.

    Raises:
        BundleError: there is none, one that is not known, or one without all of its graphs.
    """
    found = fields.names()
    for name in found:
        if name not in PRECISIONS:
            raise fields.error(name, f"is no precision: {', '.join(PRECISIONS)} are")
    precisions = [(name, fields.inner(name)) for name in PRECISIONS if name in found]
    return {
        name: {graph: GraphSpec.from_fields(graphs.inner(graph)) for graph in GRAPH_TENSORS}
        for name, graphs in precisions
    }


def _check_tensors(manifest: Manifest) -> None:
    """The tensors must have the names that the runtime uses and sizes that fit the rest of the manifest."""
    if not manifest.precisions:
        raise BundleError("manifest.json: precisions has none")
    shapes: dict[str, tuple[int | str, ...]] = {}
    for precision, graphs in manifest.precisions.items():
        for graph_name in GRAPH_TENSORS:
            if graph_name not in graphs:
                raise BundleError(f"manifest.json: the precision {printable(precision)} has no {graph_name}")
            _check_graph(graph_name, graphs[graph_name], shapes)
    size, places = manifest.image.size, manifest.grid.rows * manifest.grid.columns
    expected: dict[str, tuple[int | None, ...]] = {
        "images": (size, size, 3),
        "grid": (places, manifest.grid.channels),
        "features": (places, None),
        "keys": (places, None),
        "state": (None,),
        "token": (),
        "log_probs": (None,),
        "attention": (places,),
    }
    for name, sizes in expected.items():
        actual = shapes[name][1:]
        if len(actual) != len(sizes) or any(b is not None and a != b for a, b in zip(actual, sizes, strict=True)):
            raise BundleError(f"manifest.json: the shape of {name} contradicts image and grid: {list(shapes[name])}")


def _check_graph(graph_name: str, graph: GraphSpec, shapes: dict[str, tuple[int | str, ...]]) -> None:
    """One graph's tensors; `shapes` has those of the graphs before, by tensor, and takes on this one's."""
    inputs, outputs = GRAPH_TENSORS[graph_name]
    names = tuple(tensor.name for tensor in graph.inputs), tuple(tensor.name for tensor in graph.outputs)
    if names != (inputs, outputs):
        raise BundleError(
            f"manifest.json: the {graph_name} graph must go from {', '.join(inputs)} to {', '.join(outputs)}"
        )
    for tensor in (*graph.inputs, *graph.outputs):
        # The encoder's features, keys and state go into the decoder as they are.
        known = "state" if tensor.name in ("initial_state", "next_state") else tensor.name
        if shapes.setdefault(known, tensor.shape)[1:] != tensor.shape[1:]:
            raise BundleError(f"manifest.json: {tensor.name} has another shape in the {graph_name} graph than before")
        dtype = {"images": "uint8", "token": "int64"}.get(tensor.name, "float32")
        if tensor.dtype != dtype:
            raise BundleError(f"manifest.json: {tensor.name} of the {graph_name} graph must be {dtype}")
