"""Graphs in fewer bits: made, compared with those in float32, and refused where they lose too much.

Fewer bits give other numbers, so what is held against limits is how much of the signal is left at each graph's outputs,
how many captions stay the same, and what that does to CIDEr on photos with real captions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from caption_export.calibration import METHODS, Seen, observe
from caption_export.errors import ExportError
from caption_export.fp16 import halve
from caption_export.graphs import ExportedGraph
from caption_export.int8 import last_nodes, quantisable, quantise
from caption_export.parity import Photo, Stage, run_rows, search_name, stages
from caption_export.pipelines import Arrays, OnnxPipeline, PipelineStepper, captions_by
from caption_export.structure import GraphReport, check_structure
from caption_rt.bundle import GRAPH_TENSORS
from caption_rt.engine import multiplies_exactly
from caption_rt.errors import OptionsError, Parameter
from caption_rt.options import DecodeOptions
from caption_rt.selftest import forced_log_probs
from caption_rt.vocabulary import Vocabulary
from caption_train.scores import score_captions

logger = logging.getLogger(__name__)

Graphs = Mapping[str, ExportedGraph]

_ROWS = 8  # that go through a graph together
_TRIED_PHOTOS = 8  # on which nodes are tried one by one
_KEPT = (0, 1, 2, 4, 8, 16)  # nodes in float, one number after the other until the limits hold
_SELFTEST_FLOOR = {"fp16": 0.02, "int8": 0.25}


@dataclass(frozen=True)
class Limits:
    """What a reduced precision may lose."""

    min_sqnr: float
    """Least ratio of signal to quantisation noise at any output of any graph, in dB; see `sqnr`."""
    min_equal: float
    """Least share of captions with the same words as in float32, 0 to 1."""
    max_cider_loss: float
    """Most that CIDEr (0 to 10) may fall below that of float32."""

    def __post_init__(self) -> None:
        """See that each is a number, which a comparison has a use for.

        Raises:
            OptionsError: One is not.
        """
        for name, value in asdict(self).items():
            if not math.isfinite(value):
                raise OptionsError(Parameter(name), f" must be a number, not {value}")


LIMITS: Mapping[str, Limits] = {"fp16": Limits(40.0, 0.9, 0.01), "int8": Limits(20.0, 0.5, 0.01)}
"""What holds where nothing else is asked for."""


@dataclass(frozen=True)
class Scored:
    """Photos with real captions, on which CIDEr is measured."""

    photos: Sequence[Photo]
    references: Mapping[str, Sequence[str]]
    """Photo's name -> its real captions."""


@dataclass(frozen=True)
class Reduction:
    """What is asked for."""

    precisions: tuple[str, ...]
    """"fp16", "int8"."""
    calibration: Sequence[Photo]
    """Photos that ranges are chosen on; others than those that are compared and scored."""
    scored: Scored
    limits: Mapping[str, Limits] = field(default_factory=lambda: LIMITS)
    weight_bits: int = 8
    """Of int8: 8, or 7 for processors whose products of 8 bits saturate; see `caption_export.int8`."""


@dataclass(frozen=True)
class CaptionsReport:
    """Captions of the photos with real captions, by one search, beside those in float32."""

    options: DecodeOptions
    """How was searched."""
    captions: int
    """How many captions: one a photo."""
    equal: float
    """Share of them with the same words."""
    fp32: Mapping[str, float]
    """CIDEr and BLEU-4 of those in float32."""
    scores: Mapping[str, float]
    """The same of these."""

    @property
    def cider_loss(self) -> float:
        """How much lower CIDEr is than in float32; negative where it is higher."""
        return self.fp32["CIDEr"] - self.scores["CIDEr"]


@dataclass(frozen=True)
class ReducedReport:
    """What a reduced precision loses."""

    precision: str
    graphs: tuple[GraphReport, ...]
    methods: Mapping[str, Mapping[str, float]]
    """Of int8, by graph: SQNR in dB of its first output by how ranges are chosen; the best was taken."""
    in_float: Mapping[str, Sequence[str]]
    """By graph, the nodes that stay in float32."""
    losses: Mapping[str, float]
    """SQNR in dB by node of the extractor, that node alone being in 8 bits; empty where it was not needed."""
    sqnr: Mapping[str, float]
    """In dB, by "graph.output"."""
    searches: tuple[CaptionsReport, ...]
    """Captions by each search, the first of them greedy."""
    selftest_difference: float
    """Largest difference of a word's log-probability in the self-test, in nats."""
    weight_bits: int
    """How many bits a weight has: 16, 8 or 7."""
    exact: bool
    """Whether the processor that it was measured on sums products of 8 bits exactly."""
    limits: Limits

    @property
    def selftest_tolerance(self) -> float:
        """What the bundle's self-test allows: twice what was measured, since processors differ, and a floor."""
        return round(max(_SELFTEST_FLOOR[self.precision], 2 * self.selftest_difference), 4)


@dataclass(frozen=True)
class _Compared:
    """One graph's inputs, and what it makes of them in float32."""

    stage: Stage
    wanted: Arrays

    def sqnr(self, graph: ExportedGraph, count: int | None = None) -> dict[str, float]:
        """In dB by output, on some rows."""
        rows = np.arange(len(self.stage.labels))[:count]
        found = run_rows(OnnxPipeline({graph.name: graph}), self.stage, rows, _ROWS)
        return {name: sqnr(self.wanted[name][rows], found[name]) for name in GRAPH_TENSORS[graph.name][1]}


def sqnr(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Signal to quantisation noise of the median row in dB, 10 log10(sum x^2 / sum e^2), from -200 to 200.

    The median, because a photo that the extractor answers with hundreds of times the values of all others would be all
    that a sum over photos tells of.

    Args:
        wanted: Values in float32 [rows, ...].
        found: Those of the reduced precision.
    """
    flat = len(wanted), -1
    signal = np.square(wanted, dtype=np.float64).reshape(flat).sum(axis=1)
    noise = np.square(wanted.astype(np.float64) - found).reshape(flat).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(noise == 0, np.inf, np.where(np.isfinite(noise), signal / noise, 0))
    return float(np.median(10 * np.log10(np.clip(ratio, 1e-20, 1e20))))


class Reducer:
    """Makes the reduced precisions of one export."""

    def __init__(
        self,
        graphs: Graphs,
        compared: Sequence[Photo],
        selftest: Sequence[Photo],
        expected: Sequence[Mapping[str, object]],
        searches: Sequence[DecodeOptions],
        vocabulary: Vocabulary,
        asked: Reduction,
    ) -> None:
        """Run the graphs in float32 on all photos.

        Args:
            graphs: The three graphs in float32, compared with TensorFlow already.
            compared: Photos on which outputs are compared.
            selftest: The images of the self-test.
            expected: What TensorFlow makes of them, as in ``selftest.json``.
            searches: How captions are compared and scored, each of them held against the limits.
            vocabulary: For the special ids.
            asked: The precisions.

        Raises:
            ExportError: ONNX Runtime fails.
        """
        self._graphs, self._asked, self._vocabulary = graphs, asked, vocabulary
        self._selftest, self._expected = selftest, expected
        self._searches = [replace(search, guard=False) for search in searches]
        fp32 = OnnxPipeline(graphs)
        logger.info("counting what %d photos give in each graph", len(asked.calibration))
        words = searches[0].max_words
        self._seen = {
            stage.graph.name: _observed(stage) for stage in stages(fp32, graphs, asked.calibration, vocabulary, words)
        }
        self._compared = {
            stage.graph.name: _Compared(stage, run_rows(fp32, stage, np.arange(len(stage.labels)), _ROWS))
            for stage in stages(fp32, graphs, compared, vocabulary, words)
        }
        self._fp32 = self._caption(fp32)

    def make(self, precision: str) -> tuple[dict[str, ExportedGraph], ReducedReport]:
        """A reduced precision that holds its limits.

        Args:
            precision: "fp16" or "int8".

        Raises:
            ExportError: It does not hold them; with the graph and output or the loss, and how far.
        """
        logger.info("making %s", precision)
        return self._fp16() if precision == "fp16" else self._int8()

    def _fp16(self) -> tuple[dict[str, ExportedGraph], ReducedReport]:
        made = {name: halve(graph, self._seen[name]) for name, graph in self._graphs.items()}
        graphs = {name: graph for name, (graph, _) in made.items()}
        report = self._report("fp16", graphs, in_float={name: kept for name, (_, kept) in made.items()})
        _check(report)
        return graphs, report

    def _int8(self) -> tuple[dict[str, ExportedGraph], ReducedReport]:
        if self._asked.weight_bits == 8 and not multiplies_exactly():
            logger.warning(
                "this processor does not sum products of 8 bits exactly, so int8 loses more here than elsewhere: "
                "--reduce-range makes weights of 7 bits, which it does"
            )
        methods = {name: self._methods(name) for name in self._graphs}
        chosen = {name: max(found, key=lambda method: found[method]) for name, found in methods.items()}
        last = last_nodes(self._graphs["extractor"])
        rest = {name: self._quantise(name, chosen[name]) for name in ("encoder", "decoder")}
        losses: dict[str, float] = {}
        for count in _KEPT:
            if count == 1:
                losses = self._losses(chosen["extractor"], last)
            kept = [*last, *list(losses)[:count]]
            graphs = {"extractor": self._quantise("extractor", chosen["extractor"], kept), **rest}
            in_float = {"extractor": kept, "encoder": [], "decoder": []}
            report = self._report("int8", graphs, in_float=in_float, methods=methods, losses=losses)
            try:
                _check(report)
            except ExportError as exc:
                if count == _KEPT[-1] or not _extractor_may_help(report):
                    raise
                logger.info("%s", exc)
            else:
                return graphs, report
        raise AssertionError("the last number of nodes returns or raises")

    def _quantise(self, name: str, method: str, in_float: Sequence[str] = ()) -> ExportedGraph:
        return quantise(self._graphs[name], self._seen[name], method, in_float, self._asked.weight_bits)

    def _methods(self, name: str) -> dict[str, float]:
        """SQNR of a graph's first output by how ranges are chosen."""
        first = GRAPH_TENSORS[name][1][0]
        kept = last_nodes(self._graphs[name]) if name == "extractor" else []
        return {method: self._compared[name].sqnr(self._quantise(name, method, kept))[first] for method in METHODS}

    def _losses(self, method: str, last: Sequence[str]) -> dict[str, float]:
        """SQNR of the grid with one node of the extractor in 8 bits, those that lose most first."""
        nodes = [name for name in quantisable(self._graphs["extractor"]) if name not in last]
        logger.info("trying the extractor's %d nodes one by one", len(nodes))
        found = {}
        for node in nodes:
            others = [*last, *(name for name in nodes if name != node)]
            alone = self._quantise("extractor", method, others)
            found[node] = self._compared["extractor"].sqnr(alone, _TRIED_PHOTOS)["grid"]
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def _report(
        self,
        precision: str,
        graphs: Graphs,
        *,
        in_float: Mapping[str, Sequence[str]],
        methods: Mapping[str, Mapping[str, float]] | None = None,
        losses: Mapping[str, float] | None = None,
    ) -> ReducedReport:
        pipeline = OnnxPipeline(graphs)
        noise = {
            f"{name}.{output}": value
            for name, compared in self._compared.items()
            for output, value in compared.sqnr(graphs[name]).items()
        }
        searches = []
        for options, (wanted, fp32), (found, scores) in zip(
            self._searches, self._fp32, self._caption(pipeline), strict=True
        ):
            equal = [one == other for one, other in zip(found, wanted, strict=True)]
            searches.append(CaptionsReport(options, len(equal), float(np.mean(equal)), fp32, scores))
        return ReducedReport(
            precision,
            tuple(check_structure(graph) for graph in graphs.values()),
            methods or {},
            in_float,
            losses or {},
            noise,
            tuple(searches),
            self._selftest_difference(pipeline),
            16 if precision == "fp16" else self._asked.weight_bits,
            multiplies_exactly(),
            self._asked.limits[precision],
        )

    def _caption(self, pipeline: OnnxPipeline) -> list[tuple[list[tuple[int, ...]], dict[str, float]]]:
        """By each search: token ids of the scored photos' captions, and their scores."""
        photos, references = self._asked.scored.photos, self._asked.scored.references
        images, found = np.stack([photo.pixels for photo in photos]), []
        for captions in captions_by(pipeline, images, self._searches, self._vocabulary):
            texts = {x.name: self._vocabulary.decode(y.tokens) for x, y in zip(photos, captions, strict=True)}
            scores = score_captions(texts, references)
            tokens = [hypothesis.tokens for hypothesis in captions]
            found.append((tokens, {name: scores[name] for name in ("CIDEr", "BLEU-4")}))
        return found

    def _selftest_difference(self, pipeline: OnnxPipeline) -> float:
        largest = 0.0
        for photo, expected in zip(self._selftest, self._expected, strict=True):
            grid = pipeline.run("extractor", {"images": photo.pixels[None]})["grid"]
            tokens, words = expected["token_ids"], expected["word_log_probs"]
            assert isinstance(tokens, list)
            assert isinstance(words, list)
            found = forced_log_probs(PipelineStepper(pipeline, grid), tokens, self._vocabulary.start_id)
            largest = max([largest, *(abs(x - y) for x, y in zip(found, words, strict=True))])
        return largest


def _observed(stage: Stage) -> dict[str, Seen]:
    names = GRAPH_TENSORS[stage.graph.name][0]
    # Every tensor of a full-size extractor is there for each photo: tens of megabytes.
    size = 1 if stage.graph.name == "extractor" else _ROWS
    starts = range(0, len(stage.labels), size)
    rows = (np.arange(start, min(start + size, len(stage.labels))) for start in starts)
    return observe(stage.graph, ([inputs[name] for name in names] for inputs in map(stage.take, rows)))


def _check(report: ReducedReport) -> None:
    """Hold a report against its limits.

    Raises:
        ExportError: One does not hold.
    """
    limits, precision = report.limits, report.precision
    name, value = min(report.sqnr.items(), key=lambda item: item[1])
    if not value >= limits.min_sqnr:
        graph, output = name.split(".")
        raise ExportError(
            f"{precision}: output {output} of the {graph} graph keeps {value:.1f} dB above its quantisation noise, and "
            f"{limits.min_sqnr:g} dB are asked for"
        )
    for search in report.searches:
        how = search_name(search.options)
        if not search.equal >= limits.min_equal:
            raise ExportError(
                f"{precision}: {search.equal:.1%} of {search.captions} captions ({how}) are those of fp32, and "
                f"{limits.min_equal:.1%} are asked for"
            )
        if not search.cider_loss <= limits.max_cider_loss:
            raise ExportError(
                f"{precision}: CIDEr falls by {search.cider_loss:.4f}, from {search.fp32['CIDEr']:.4f} to "
                f"{search.scores['CIDEr']:.4f} on {search.captions} photos ({how}), and {limits.max_cider_loss:g} is "
                "allowed"
            )


def _extractor_may_help(report: ReducedReport) -> bool:
    """Whether more of the extractor in float could mend what a report falls short of."""
    others = [value for name, value in report.sqnr.items() if not name.startswith("extractor.")]
    return min(others) >= report.limits.min_sqnr
