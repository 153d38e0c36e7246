"""What the tests of the exporter share: a trained run of a few kB, and the photos to compare on."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from caption_export.graphs import ExportedGraph
    from caption_export.parity import Photo
    from caption_export.pipelines import TensorFlowPipeline
    from caption_train.runs import Run

# Before TensorFlow is imported, which reads it once: what it says of its own set-up is not about the tests.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# These import TensorFlow at their head. Without it they are left out, unless nothing may be (see tests/conftest.py).
# The tools around bundles do not need it.
if importlib.util.find_spec("tensorflow") is None and os.environ.get("CAPTION_RT_NO_SKIP") != "1":
    collect_ignore = [path for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_bundle_tools.py"]

MAX_WORDS = 6
WORDS = "a black cat dog on the grass sits runs with red ball in blue sky two people water near small boat"


def write_run(folder: Path) -> None:
    """A run folder as `caption-train` leaves it, of a tiny network with random weights.

    No weight is zero and no normalisation neutral, as a fresh network's biases and means are: an exporter that left
    them out would go unnoticed. They are drawn so that photos get different captions, and one of them ends by itself.
    """
    import keras
    import tensorflow as tf

    from caption_rt.vocabulary import Vocabulary
    from caption_train.inception import ExtractorConfig, build_extractor, save_extractor
    from caption_train.model import CaptionModel, model_config
    from caption_train.settings import load_settings, render

    rng = np.random.default_rng(7)
    extractor_config = ExtractorConfig(width=0.1, size=75, layer="mixed4")  # a grid of 3x3 places
    keras.utils.set_random_seed(7)
    extractor = build_extractor(extractor_config)
    for layer in extractor.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            beta, mean, variance = (x.shape for x in layer.get_weights())
            layer.set_weights([rng.normal(0, 0.02, beta), rng.normal(0, 0.02, mean), rng.uniform(0.8, 1.5, variance)])
    save_extractor(extractor, extractor_config, folder)
    vocabulary = Vocabulary.build([WORDS])
    settings = load_settings(
        changes=[
            "model.embedding_dim=10",
            "model.units=12",
            "model.initial_state=zeros",
            f"captions.max_words={MAX_WORDS}",
        ]
    )
    rows, columns, channels = extractor.output_shape[1:]
    model = CaptionModel(model_config(settings, rows * columns, channels, len(vocabulary)))
    rng = np.random.default_rng(10)
    spread = {channels: 0.4}  # of the encoder's kernel, whose inputs are larger than the others'
    model.set_weights([rng.normal(0, spread.get(weight.shape[0], 1.2), weight.shape) for weight in model.get_weights()])
    checkpoint = tf.train.Checkpoint(
        encoder=model.encoder, decoder=model.decoder, step=tf.Variable(30, dtype=tf.int64, trainable=False)
    )
    for which in ("best", "last"):
        tf.train.CheckpointManager(checkpoint, str(folder / which), max_to_keep=1).save(30)
    record = {
        "dataset": {"name": "drawn", "training_photos": 40, "training_captions": 200, "validation_photos": 10},
        "extractor": {**asdict(extractor_config), "weights": "none"},
    }
    scores = {"validation": {"photos": 10, "checkpoint": "best", "beam_size": 1, "BLEU-4": 12.3456, "CIDEr": 0.4321}}
    (folder / "settings.toml").write_text(render(settings), encoding="utf-8")
    for name, content in (("run", record), ("vocabulary", vocabulary.to_json()), ("scores", scores)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained run that carries its state."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="session")
def run(run_folder: Path) -> Run:
    """That run, opened."""
    from caption_train.runs import open_run

    return open_run(run_folder)


@pytest.fixture(scope="session")
def graphs(run: Run) -> dict[str, ExportedGraph]:
    """Its graphs; not to be changed."""
    from caption_export.graphs import build_graphs

    return build_graphs(run)


@pytest.fixture(scope="session")
def reset_run(run: Run) -> Run:
    """The same weights in a model that resets its state, as the tutorial's code does."""
    from caption_train.model import CaptionModel

    model = CaptionModel(replace(run.model.config, recurrence="reset"))
    model.set_weights(run.model.get_weights())
    return replace(run, model=model)


@pytest.fixture(scope="session")
def reset_graphs(reset_run: Run, graphs: dict[str, ExportedGraph]) -> dict[str, ExportedGraph]:
    """Its graphs; only the decoder is another one."""
    from caption_export.graphs import build_graph

    return {**graphs, "decoder": build_graph(reset_run, "decoder")}


@pytest.fixture(scope="session")
def mean_run(run: Run) -> Run:
    """The same weights in a model whose state begins with the mean feature, as in the paper."""
    from caption_train.model import CaptionModel

    model = CaptionModel(replace(run.model.config, initial_state="mean"))
    model.encoder.set_weights(run.model.encoder.get_weights())
    rng = np.random.default_rng(11)
    known = {weight.path: weight.numpy() for weight in run.model.decoder.weights}
    for weight in model.decoder.weights:
        weight.assign(known[weight.path] if weight.path in known else rng.normal(0, 0.5, weight.shape))
    return replace(run, model=model)


@pytest.fixture(scope="session")
def reference(run: Run) -> TensorFlowPipeline:
    """Its networks in TensorFlow."""
    from caption_export.pipelines import TensorFlowPipeline

    return TensorFlowPipeline(run)


@pytest.fixture(scope="session")
def compared(run: Run, photos: list[Path]) -> list[Photo]:
    """The committed photos, read for the run's extractor."""
    from caption_export.exporting import read_photos

    return read_photos(photos, run.extractor_config.size)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command here; gives its exit code and what it printed."""
    from caption_export.cli import main

    def run(*arguments: object) -> SimpleNamespace:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(exit_code=code, stdout=printed.out, stderr=printed.err)

    return run
