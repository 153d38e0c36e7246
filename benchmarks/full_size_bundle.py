"""Make a bundle of the tutorial's full size, InceptionV3 at 299 pixels and a GRU of 512, with random weights.

    python benchmarks/full_size_bundle.py /tmp/full-size

Speed does not depend on what weights say. Its captions mean nothing, and do not end before they are cut. Needs the
extra `export`; writes through `caption-export`, which compares every graph with TensorFlow.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np


def write_run(folder: Path) -> None:
    """A run folder as `caption-train` leaves it, whose weights are as they were initialised."""
    import keras
    import tensorflow as tf

    from caption_rt.vocabulary import Vocabulary
    from caption_train.inception import ExtractorConfig, build_extractor, save_extractor
    from caption_train.model import CaptionModel, model_config
    from caption_train.settings import load_settings, render

    keras.utils.set_random_seed(0)
    extractor_config, settings = ExtractorConfig(), load_settings()
    extractor = build_extractor(extractor_config)
    save_extractor(extractor, extractor_config, folder)
    vocabulary = Vocabulary.build([" ".join(f"word{i}" for i in range(5000))])
    rows, columns, channels = extractor.output_shape[1:]
    model = CaptionModel(model_config(settings, rows * columns, channels, len(vocabulary)))
    # Flat log-probabilities would make every word a tie, on which two machines may differ.
    rng = np.random.default_rng(0)
    model.set_weights([weight + rng.normal(0, 0.05, weight.shape) for weight in model.get_weights()])
    checkpoint = tf.train.Checkpoint(
        encoder=model.encoder, decoder=model.decoder, step=tf.Variable(0, dtype=tf.int64, trainable=False)
    )
    tf.train.CheckpointManager(checkpoint, str(folder / "best"), max_to_keep=1).save(0)
    record = {
        "dataset": {"name": "none", "training_photos": 0, "training_captions": 0, "validation_photos": 0},
        "extractor": {**asdict(extractor_config), "weights": "none"},
    }
    (folder / "settings.toml").write_text(render(settings), encoding="utf-8")
    for name, content in (("run", record), ("vocabulary", vocabulary.to_json())):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def main() -> int:
    """Make the run in a temporary folder and export it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder of the bundle")
    parser.add_argument("--photos", default="tests/data/photos", help="photos to compare with TensorFlow on")
    arguments = parser.parse_args()
    from caption_export.cli import main as caption_export

    with tempfile.TemporaryDirectory() as run:
        write_run(Path(run))
        return caption_export([run, arguments.out, "--photos", arguments.photos, "--name", "full-size"])


if __name__ == "__main__":
    raise SystemExit(main())
