"""The whole way on real photos: what the example's script promises, in the time that it promises."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caption_rt import Bundle, DecodeOptions

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_export_run.sh"


def forty_photos(flickr8k: Path, folder: Path) -> Path:
    """Flickr8k's first 30 training and 10 validation photos, as a set of their own."""
    folder.mkdir()
    kept = set()
    for part, count in (("train", 30), ("dev", 10)):
        name = f"Flickr_8k.{part}Images.txt"
        names = (flickr8k / name).read_text().split()[:count]
        (folder / name).write_text("\n".join(names) + "\n")
        kept |= set(names)
    with (flickr8k / "Flickr8k.token.txt").open(encoding="utf-8") as lines:
        (folder / "Flickr8k.token.txt").write_text("".join(x for x in lines if x.split("#")[0] in kept), "utf-8")
    (folder / "images").symlink_to(flickr8k / "images")
    return folder


@pytest.mark.slow
@pytest.mark.tf
@pytest.mark.data
@pytest.mark.skipif(os.name != "posix", reason="a script of the shell")
def test_from_captioned_photos_to_a_caption(shared: Path, photos: list[Path], tmp_path: Path) -> None:
    # The commands stand beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    started = time.monotonic()
    done = subprocess.run(
        [SCRIPT, forty_photos(shared / "flickr8k", tmp_path / "data"), tmp_path, *photos],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 600
    lines = done.stdout.splitlines()
    bundle = Bundle.open(tmp_path / "bundle")
    assert [line.split("\t")[0] for line in lines[-3:]] == [str(photo) for photo in photos]
    for line in lines[-3:]:
        words = line.split("\t")[1].split()
        assert 1 <= len(words) <= 12
        assert set(words) <= set(bundle.vocabulary.words)
    assert lines[-4].startswith("self-test passed: bundle, 2 photos on ")
    scores = dict(line.rsplit(maxsplit=1) for line in lines[:7])
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "photos"]
    assert scores["photos"] == "10"
    assert float(scores["BLEU-1"]) > 20  # what is said of most photos, it says
    assert bundle.manifest.training["dataset"]["training_photos"] == 30
    assert bundle.manifest.scores["validation"]["BLEU-1"] == pytest.approx(float(scores["BLEU-1"]), abs=1e-3)

    from caption_train.datasets import CaptionedImage
    from caption_train.runs import evaluate, open_run

    # On the device the very tokens of TensorFlow's greedy search, on photos that the exporter did not compare.
    names = (shared / "flickr8k" / "Flickr_8k.devImages.txt").read_text().split()
    unseen = [shared / "flickr8k" / "images" / name for name in names[:20]]
    command = [
        Path(sys.executable).with_name("caption-rt"),
        "--json",
        "--no-guard",
        "--model",
        tmp_path / "bundle",
        *unseen,
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    trained = open_run(tmp_path / "run")
    images = [CaptionedImage(path, ("a photo",)) for path in unseen]
    found = evaluate(trained, images, tmp_path / "grids", DecodeOptions(max_words=trained.max_words))
    assert [json.loads(line)["tokens"] for line in told] == [list(best.tokens) for best in found.hypotheses]
    assert len({best.tokens for best in found.hypotheses}) > 1
