"""The same captioner twice: as TensorFlow trained it, and as ONNX Runtime runs the exported graphs.

Shapes: n photos, m rows (hypotheses), S pixels, P places, C channels, U GRU units, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_export.errors import ExportError
from caption_export.graphs import ExportedGraph, graph_specs
from caption_rt.bundle import GRAPH_TENSORS
from caption_rt.captioning import special_tokens
from caption_rt.engine import Graph
from caption_rt.errors import BundleError, EngineError
from caption_rt.options import DecodeOptions
from caption_rt.search import Step, decode
from caption_rt.strategies import Hypothesis
from caption_rt.vocabulary import Vocabulary
from caption_train.inception import extract_with
from caption_train.runs import Run

Arrays = Mapping[str, NDArray[Any]]
"""Tensors by name."""

_PHOTOS = 16  # that go through the extractor and are decoded together


class Pipeline(Protocol):
    """Photo to words in three stages."""

    def run(self, graph: str, inputs: Arrays) -> Arrays:
        """One stage: ``extractor``, ``encoder`` or ``decoder``, with the tensors of `caption_rt.bundle.GRAPH_TENSORS`.

        The first axis of all inputs has the same size, whatever it is.
        """


class TensorFlowPipeline:
    """The networks of a run, as they were trained."""

    def __init__(self, run: Run) -> None:
        """Trace the functions.

        Raises:
            ExportError: The parts of the run do not fit each other.
        """
        specs = graph_specs(run)

        def traced(name: str, function: Any) -> Any:
            signature = [tf.TensorSpec((None, *x.shape[1:]), x.dtype, x.name) for x in specs[name].inputs]
            return tf.function(function, input_signature=signature)

        extract = extract_with(run.extractor)
        self._functions = {
            "extractor": lambda images: (extract(images),),
            "encoder": traced("encoder", run.model.encode),
            "decoder": traced("decoder", run.model.decoder.step),
        }

    def run(self, graph: str, inputs: Arrays) -> Arrays:
        """One stage; see `Pipeline`."""
        input_names, output_names = GRAPH_TENSORS[graph]
        outputs = self._functions[graph](*(inputs[name] for name in input_names))
        return {name: np.asarray(value) for name, value in zip(output_names, outputs, strict=True)}


class OnnxPipeline:
    """The exported graphs in ONNX Runtime, by the runtime's own engine, on the CPU."""

    def __init__(self, graphs: Mapping[str, ExportedGraph]) -> None:
        """Open the graphs.

        Raises:
            ExportError: ONNX Runtime refuses a graph, or its tensors are not those of the specification.
        """
        self._graphs = {}
        for name, graph in graphs.items():
            try:
                self._graphs[name] = Graph(graph.data, graph.spec, device="cpu")
            except (BundleError, EngineError) as exc:
                raise ExportError(f"the {name} graph cannot be opened: {exc}") from exc

    def run(self, graph: str, inputs: Arrays) -> Arrays:
        """One stage; see `Pipeline`.

        Raises:
            ExportError: ONNX Runtime stops with an error.
        """
        names, outputs = GRAPH_TENSORS[graph]
        try:
            values = self._graphs[graph].run(*(inputs[name] for name in names))
        except EngineError as exc:
            batch = len(inputs[names[0]])
            raise ExportError(f"the {graph} graph fails with a first axis of {batch}: {exc}") from exc
        return dict(zip(outputs, values, strict=True))


class PipelineStepper:
    """A pipeline bound to photos, as `caption_rt.search.Stepper`; remembers what its decoder was given."""

    def __init__(self, pipeline: Pipeline, grid: NDArray[np.float32]) -> None:
        """Encode the photos.

        Args:
            pipeline: Either side.
            grid: float32 [n, P, C].
        """
        self._pipeline = pipeline
        self.encoded = pipeline.run("encoder", {"grid": grid})
        self.steps: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]] = []
        """Of every step so far: tokens int64 [m], state float32 [m, U], photos int64 [m]."""

    @property
    def batch_size(self) -> int:
        """Number of photos."""
        return len(self.encoded["features"])

    def initial_state(self) -> NDArray[np.float32]:
        """State before the first word, float32 [n, U]."""
        return self.encoded["initial_state"]

    def step(self, tokens: NDArray[np.int64], state: NDArray[np.float32], images: NDArray[np.int64]) -> Step:
        """One word for m rows, row i belonging to photo ``images[i]``; see `caption_rt.search.Stepper`."""
        self.steps.append((tokens, state, images))
        of_photos = {name: self.encoded[name][images] for name in ("features", "keys")}
        outputs = self._pipeline.run("decoder", {"token": tokens, "state": state, **of_photos})
        return Step(outputs["log_probs"], outputs["next_state"], outputs["attention"])


def best_captions(
    pipeline: Pipeline, images: NDArray[np.uint8], options: DecodeOptions, vocabulary: Vocabulary
) -> list[Hypothesis]:
    """Caption photos from the pixels on.

    Args:
        pipeline: Either side.
        images: uint8 [n, S, S, 3].
        options: How to search.
        vocabulary: For the special ids.

    Returns:
        The best hypothesis of each photo, in order.
    """
    (found,) = captions_by(pipeline, images, [options], vocabulary)
    return found


def captions_by(
    pipeline: Pipeline, images: NDArray[np.uint8], searches: Sequence[DecodeOptions], vocabulary: Vocabulary
) -> list[list[Hypothesis]]:
    """Caption photos by several searches; the extractor sees each photo once.

    Args:
        pipeline: Either side.
        images: uint8 [n, S, S, 3].
        searches: How to search.
        vocabulary: For the special ids.

    Returns:
        By search, the best hypothesis of each photo, in order.
    """
    found: list[list[Hypothesis]] = [[] for _ in searches]
    for chunk in chunks(images, _PHOTOS):
        stepper = PipelineStepper(pipeline, pipeline.run("extractor", {"images": chunk})["grid"])
        for captions, options in zip(found, searches, strict=True):
            captions += [hypotheses[0] for hypotheses in search(stepper, options, vocabulary)]
    return found


def search(stepper: PipelineStepper, options: DecodeOptions, vocabulary: Vocabulary) -> list[list[Hypothesis]]:
    """The runtime's own search, with the ids of a vocabulary."""
    return decode(stepper, options, special_tokens(vocabulary, options))


def chunks(images: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    """Photos uint8 [n, S, S, 3] in groups of at most `size`."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
