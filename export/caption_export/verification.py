"""What an export found, as ``verification.json`` keeps it in the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from caption_export.parity import Report, search_name
from caption_export.reduced import ReducedReport
from caption_export.structure import GraphReport


@dataclass(frozen=True)
class Verification:
    """What was compared before a bundle was written, and how close it came."""

    report: Report
    """The graphs in float32 beside TensorFlow."""
    reduced: tuple[ReducedReport, ...]
    """Reduced precisions beside float32."""
    selftest_images: int
    """How many of the images that were compared are those of the self-test, and no photos."""

    def to_json(self) -> dict[str, Any]:
        """The object of ``verification.json``; docs/export.md describes it."""
        report = self.report
        return {
            "photos": len(report.photos) - self.selftest_images,
            "selftest_images": self.selftest_images,
            "batch_sizes": list(report.batch_sizes),
            "fp32": {
                "graphs": _graphs(report.graphs),
                "outputs": [
                    {
                        "graph": tensor.graph,
                        "output": tensor.tensor,
                        "max_difference": tensor.max_difference,
                        "photo": tensor.photo,
                        "allowed": asdict(tensor.tolerance),
                    }
                    for tensor in report.tensors
                ],
                "captions": [
                    {
                        "search": search_name(search.options),
                        "captions": search.captions,
                        "words": search.words,
                        "equal": 1.0,
                        "max_log_prob_difference": search.max_difference,
                        "allowed": search.tolerance,
                    }
                    for search in report.searches
                ],
            },
            **{reduced.precision: _reduced(reduced) for reduced in self.reduced},
        }


def _graphs(graphs: Sequence[GraphReport]) -> dict[str, Any]:
    return {
        graph.name: {"bytes": graph.size, "opset": graph.opset, "nodes": graph.nodes, "operators": graph.operators}
        for graph in graphs
    }


def _reduced(report: ReducedReport) -> dict[str, Any]:
    return {
        "graphs": _graphs(report.graphs),
        "weight_bits": report.weight_bits,
        "in_float32": {name: list(nodes) for name, nodes in report.in_float.items()},
        "ranges_sqnr_db": {name: _rounded(found, 2) for name, found in report.methods.items()},
        "nodes_sqnr_db": _rounded(report.losses, 2),
        "outputs_sqnr_db": _rounded(report.sqnr, 2),
        "captions": [
            {
                "search": search_name(search.options),
                "captions": search.captions,
                "equal": round(search.equal, 4),
                "scores": {"fp32": _rounded(search.fp32, 4), report.precision: _rounded(search.scores, 4)},
                "cider_loss": round(search.cider_loss, 4),
            }
            for search in report.searches
        ],
        "selftest": {"max_difference": report.selftest_difference, "tolerance": report.selftest_tolerance},
        "limits": asdict(report.limits),
    }


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
