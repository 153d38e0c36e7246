"""``verification.json`` as whoever has a bundle reads it. Neither TensorFlow nor ONNX is needed."""

from __future__ import annotations

from caption_rt._fields import Fields, parse_json
from caption_rt.bundle import Bundle

VERIFICATION_FILE = "verification.json"


def stated_verification(bundle: Bundle) -> Fields | None:
    """What a bundle says of its verification; None if nothing.

    Raises:
        BundleError: The file is not a JSON object, or has changed since the bundle was opened.
    """
    if VERIFICATION_FILE not in bundle.manifest.files:
        return None
    return Fields(parse_json(bundle.read(VERIFICATION_FILE), VERIFICATION_FILE), VERIFICATION_FILE)


def measured_scores(bundle: Bundle) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of captions that ONNX Runtime wrote during the export, by precision and search.

    A bundle of fp32 alone states none: where its words are TensorFlow's, so are their scores.

    Returns:
        For each precision that is in the bundle and was scored, by search, CIDEr and BLEU-4 by name, and of a reduced
        precision under "equal captions" the share of captions with the words of float32.

    Raises:
        BundleError: ``verification.json`` is not what an export writes.
    """
    there = bundle.manifest.precisions
    found: dict[str, dict[str, dict[str, float]]] = {precision: {} for precision in there}
    record = stated_verification(bundle)
    if record is None:
        return {}
    for precision in (name for name in there if name != "fp32" and name in record.names()):
        for search in record.inner(precision).inners("captions"):
            name, scores = search.text("search"), search.inner("scores")
            for of in {"fp32", precision} & there.keys():
                values = scores.inner(of)
                found[of][name] = {score: values.number(score) for score in values.names()}
            found[precision][name]["equal captions"] = search.number("equal")
    return {precision: searches for precision, searches in found.items() if searches}
