"""The model card: the bundle's README.md, from what is known of the run and what the verification found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caption_export.parity import LOG_PROB_TOLERANCE, search_name
from caption_export.reduced import CaptionsReport, Limits, ReducedReport
from caption_export.stated import VERIFICATION_FILE
from caption_export.verification import Verification
from caption_rt.bundle import GridSpec
from caption_rt.options import DecodeOptions
from caption_train.model import ModelConfig
from caption_train.residual import STAGES


@dataclass(frozen=True)
class CardFacts:
    """What the card says."""

    name: str
    """Short name of the model."""
    license: str
    """Licence of the weights."""
    size: int
    """Pixels on each side of the photo that the network sees."""
    grid: GridSpec
    precisions: tuple[str, ...]
    """Of the graphs that are in the bundle."""
    model: ModelConfig
    parameters: int
    """Weights of all three networks together."""
    decoding: DecodeOptions
    training: Mapping[str, Any]
    """How and on what it was trained."""
    scores: Mapping[str, Any]
    """Its scores by split; may be empty."""
    teacher_scores: Mapping[str, Any]
    """Those of a captioner on the grid that the extractor learned to reproduce; may be empty."""
    notes: str
    """What its maker has written about it: Markdown with headings of its own, or nothing."""
    versions: Mapping[str, str]
    verification: Verification


def model_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    parts = (_what, _data, _scores, _verification, _use, _notes, _versions)
    return "\n\n".join(text for part in parts if (text := "\n".join(part(facts)))) + "\n"


def _what(facts: CardFacts) -> Iterator[str]:
    grid, model = facts.grid, facts.model
    yield f"# {facts.name}"
    yield ""
    yield (
        "Describes a photo in one English sentence. A bundle for caption-rt: three ONNX graphs, the vocabulary, a "
        "self-test and this card."
    )
    yield ""
    yield (
        'The model is that of "Show, Attend and Tell" (Xu et al. 2015) as TensorFlow\'s image-captioning tutorial '
        f"builds it. A photo of {facts.size}x{facts.size} pixels becomes a grid of {grid.rows}x{grid.columns} places "
        f"with {grid.channels} channels ({_topology(facts.training)}); a dense layer makes {model.embedding_dim} "
        f"features of each; a GRU of {model.units} units with Bahdanau attention writes the sentence, word by word, "
        f"from {model.vocabulary_size} words. {facts.parameters / 1e6:.1f} million weights in single precision."
    )
    yield ""
    carried = "is carried from word to word" if model.recurrence == "carry" else "starts anew with each word"
    yield f"The recurrent state {carried} (`recurrence: {model.recurrence}`)."
    yield f"Precisions: {', '.join(facts.precisions)}."


def _topology(training: Mapping[str, Any]) -> str:
    """Which network the grid comes from."""
    layer = training.get("extractor", {}).get("layer")
    return f"the output of {layer} of a small residual network" if layer in STAGES else "InceptionV3's topology"


def _data(facts: CardFacts) -> Iterator[str]:
    yield "## How and on what it was trained"
    yield ""
    if facts.training:
        yield where_from(facts.training.get("extractor", {}))
        yield ""
        yield from _bullets(facts.training, "")
    else:
        yield "The run states nothing about its training."


def where_from(extractor: Mapping[str, Any]) -> str:
    """Whose knowledge of photos is in the extractor, in a sentence or two: what a reader of a card asks first."""
    learnt = extractor.get("learnt_from_captions")
    then = f" The extractor, {_value(learnt)}, then learned from captions as well." if learnt else ""
    return _begun_with(extractor) + then


def _begun_with(extractor: Mapping[str, Any]) -> str:
    teacher = extractor.get("distillation", {}).get("teacher")
    if teacher:
        return (
            "No pretrained weight is in it: the extractor started at random and learned to reproduce, on photos "
            f"without captions, what a larger InceptionV3 ({_value(teacher['weights'])}, its "
            f"{_value(teacher['layer'])}) says about them. Encoder and decoder started at random and "
            "learned from captions."
        )
    weights = extractor.get("weights")
    if weights == "none":
        return "The extractor has random weights and was not trained; encoder and decoder learned from captions."
    if weights is not None:
        return (
            f"The extractor has pretrained weights ({_value(weights)}); encoder and decoder started at random and "
            "learned from captions."
        )
    return "The run does not state where the extractor's weights come from."


def _scores(facts: CardFacts) -> Iterator[str]:
    yield "## Scores"
    yield ""
    usual = {"sample": False, "max_words": facts.decoding.max_words}
    own, teachers = (
        {
            split: {name: value for name, value in record.items() if name not in usual or value != usual[name]}
            for split, record in scores.items()
            if isinstance(record, Mapping)
        }
        for scores in (facts.scores, facts.teacher_scores)
    )
    if not own:
        yield "This checkpoint has not been evaluated."
        if not teachers:
            return
        yield ""
    rows = {**own, **{f"{split}, the teacher's captioner": record for split, record in teachers.items()}}
    columns = list(dict.fromkeys(name for record in rows.values() for name in record))
    yield from _table(
        ["split", *(_words(name) for name in columns)],
        [[split, *(_value(record.get(name, "")) for name in columns)] for split, record in rows.items()],
    )
    if teachers:
        yield ""
        yield (
            "The teacher's captioner is the run that its exporter named as one on the grid that this model's extractor "
            "learned to reproduce."
        )
    yield ""
    yield (
        "CIDEr from 0 to 10, the other scores in percent, all as the COCO caption evaluation computes them (its "
        "scorers on its PTB tokens); measured in TensorFlow, before the export."
    )


def _verification(facts: CardFacts) -> Iterator[str]:
    report, drawn = facts.verification.report, facts.verification.selftest_images
    graphs = "its graphs" if "fp32" in facts.precisions else "the graphs in float32, which are not in this bundle,"
    sizes = ", ".join(map(str, report.batch_sizes))
    yield "## Verification"
    yield ""
    yield (
        f"Before this bundle was written, {graphs} were run in ONNX Runtime beside the TensorFlow networks they come "
        f"from, on {len(report.photos) - drawn} photos and {drawn} drawn images, {sizes} at a time, each graph with "
        "the same inputs on both sides:"
    )
    yield ""
    yield from _table(
        ["graph", "output", "largest difference", "allowed"],
        [
            [
                tensor.graph,
                tensor.tensor,
                f"{tensor.max_difference:.1e}",
                f"{tensor.tolerance.absolute:g} + {tensor.tolerance.relative:g} of the value",
            ]
            for tensor in report.tensors
        ],
    )
    yield ""
    yield f"From the pixels on, both gave the same words (log-probabilities within {LOG_PROB_TOLERANCE:g}):"
    yield ""
    yield from _table(
        ["search", "captions", "words", "largest difference of a caption's log-probability"],
        [
            [
                search_name(search.options),
                str(search.captions),
                str(search.words),
                f"{search.max_difference:.1e}",
            ]
            for search in report.searches
        ],
    )
    yield ""
    yield from _table(
        ["graph in float32", "bytes", "nodes", "opset"],
        [[graph.name, str(graph.size), str(graph.nodes), str(graph.opset)] for graph in report.graphs],
    )
    for reduced in facts.verification.reduced:
        yield ""
        yield from _reduced(reduced, facts.precisions)
    yield ""
    yield f"All of it, with the operators by kind, stands in `{VERIFICATION_FILE}`."


def _reduced(report: ReducedReport, precisions: Sequence[str]) -> Iterator[str]:
    limits, count = report.limits, report.searches[0].captions
    yield f"### {report.precision}"
    yield ""
    yield f"Beside float32, on the same images and on {count} photos with real captions:"
    yield ""
    yield from _table(
        ["what", "found", "asked for"],
        [
            *(
                [f"signal to quantisation noise, {name}", f"{value:.1f} dB", f"at least {limits.min_sqnr:g} dB"]
                for name, value in report.sqnr.items()
            ),
            *(row for search in report.searches for row in _captions(search, limits)),
            ["bits of a weight", str(report.weight_bits), _saturation(report, precisions)],
            ["bytes of the graphs", str(sum(graph.size for graph in report.graphs)), ""],
        ],
    )
    yield ""
    yield (
        "Its self-test gives the model TensorFlow's words; their log-probabilities may be "
        f"{report.selftest_tolerance:g} off (here {report.selftest_difference:.2g})."
    )


def _saturation(report: ReducedReport, precisions: Sequence[str]) -> str:
    """What weights of 8 bits do to some processors, and what to do about it; nothing of other weights."""
    if report.weight_bits != 8:
        return ""
    exactly = "multiplies them exactly; x86 without VNNI does not"
    where = exactly if report.exact else "does not multiply them exactly, like any x86 without VNNI"
    others = [precision for precision in precisions if precision != report.precision]
    remedy = f"use {others[0]} there" if others else "for those, export with `--reduce-range`"
    return f"found on a processor that {where}: {remedy}"


def _captions(search: CaptionsReport, limits: Limits) -> Iterator[list[str]]:
    """What one search finds, a row a figure."""
    how, fp32, scores = search_name(search.options), search.fp32, search.scores
    yield [f"captions with the same words, {how}", f"{search.equal:.1%}", f"at least {limits.min_equal:.0%}"]
    cider = f"{fp32['CIDEr']:.4f}, {scores['CIDEr']:.4f}"
    yield [f"CIDEr in float32 and here, {how}", cider, f"at most {limits.max_cider_loss:g} lost"]
    yield [f"BLEU-4 in float32 and here, {how}", f"{fp32['BLEU-4']:.2f}, {scores['BLEU-4']:.2f}", ""]


def _use(facts: CardFacts) -> Iterator[str]:
    decoding = facts.decoding
    yield "## Use and limits"
    yield ""
    yield "    caption-rt --model FOLDER photo.jpg"
    yield ""
    yield (
        f"By default {search_name(decoding)} and at most {decoding.max_words} words. "
        "`caption-rt --self-test --model FOLDER` checks the bundle."
    )
    yield ""
    yield (
        "Meant for photos of everyday scenes like those it was trained on, and for learning how such a captioner "
        "works. It knows only the words and scenes of its training captions: other things are named by the nearest "
        "word it knows, and it names things that are not there. Counts, text in the photo, names of persons and "
        "places are beyond it. Captions repeat what annotators assumed, about people above all. Do not rely on a "
        "caption where a wrong one does harm, nor as the only description of a photo for people who cannot see it."
    )
    yield ""
    yield f"Licence of the weights: {facts.license}"


def _notes(facts: CardFacts) -> Iterator[str]:
    yield facts.notes.strip()


def _versions(facts: CardFacts) -> Iterator[str]:
    yield "## Made with"
    yield ""
    yield ", ".join(f"{name} {version}" for name, version in facts.versions.items())


def _bullets(record: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield f"{indent}- {_words(name)}:"
            yield from _bullets(value, indent + "  ")
        else:
            yield f"{indent}- {_words(name)}: {_value(value)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)
