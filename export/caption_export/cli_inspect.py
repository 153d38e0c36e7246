"""`caption-export inspect BUNDLE`: what is in a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from caption_rt.bundle import Bundle
from caption_rt.console import echo


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON object, for programs.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Say what is in the BUNDLE, a folder or a zip file: graphs, precisions, scores, sizes, hashes.

    Nodes and operators are counted where the package onnx is installed. Nothing is run.
    """
    from caption_export.inspecting import bundle_json, bundle_table, describe_bundle

    facts = describe_bundle(Bundle.open(bundle))
    for line in [bundle_json(facts)] if as_json else bundle_table(facts):
        echo(line)
