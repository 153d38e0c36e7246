"""What a report says of data sets whose faults are known."""

import io
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from caption_train.cli import main
from caption_train.data_report import as_text, report
from caption_train.datasets import load_dataset
from caption_train.photo_facts import fingerprint, look_at, near_pairs

TENSORFLOW = ("h5py", "keras", "matplotlib", "pycocoevalcap", "tensorflow")


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Soft shapes, as photos have them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten photos to train on, two of them the same file; four to validate on, with every kind of fault."""
    rows = []
    for i in range(10):
        picture(min(i, 8)).save(tmp_path / f"t{i}.png")
        rows += [{"image": f"t{i}.png", "captions": [f"A dog number {i}", "a cat ."], "split": "train"}]
    (tmp_path / "v0.png").write_bytes((tmp_path / "t3.png").read_bytes())
    picture(4).resize((90, 90)).save(tmp_path / "v1.jpg", quality=60)
    picture(50).save(tmp_path / "v2.png")
    (tmp_path / "v3.png").write_bytes((tmp_path / "v2.png").read_bytes()[:300])
    texts = [["A Cat!"], ["a zebra runs " * 20], ["one dog", "..."], ["number"]]
    names = ["v0.png", "v1.jpg", "v2.png", "v3.png"]
    rows += [{"image": name, "captions": text, "split": "val"} for name, text in zip(names, texts, strict=True)]
    rows += [{"image": "gone.png", "caption": "gone", "split": "val"}]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_every_number(data: Path) -> None:
    steps: list[None] = []
    found = report(load_dataset(data, max_missing_share=1.0), sizes=[3, 5, 10**6], on_photo=lambda: steps.append(None))
    assert len(steps) == 14
    assert json.loads(json.dumps(found)) == found
    assert (found["name"], found["split"]) == ("set", "own")
    assert (found["missing_photos"], found["captions_without_words"]) == (1, 1)
    assert found["parts"]["train"] == {
        "photos": 10,
        "captions": 20,
        "captions_a_photo": {"2": 10},
        "words": {
            "total": 60,
            "mean": 3.0,
            "percentile_5": 2,
            "percentile_50": 4,
            "percentile_95": 4,
            "percentile_99": 4,
            "longest": 4,
            "longer_than_40": 0,
            "counts": {"2": 10, "4": 10},
        },
    }
    validation = found["parts"]["validation"]
    assert (validation["photos"], validation["captions"], validation["captions_a_photo"]) == (4, 4, {"1": 4})
    assert (validation["words"]["longest"], validation["words"]["longer_than_40"]) == (60, 1)
    vocabulary = found["vocabulary"]
    assert vocabulary["distinct_words"] == {"train": 14, "validation": 7}
    assert vocabulary["seen_once"] == 10
    # By how often: a 20, then cat, dog and number 10 each, then ten digits once each.
    assert [row["size"] for row in vocabulary["sizes"]] == [3, 5, 14]
    assert [row["rarest_seen"] for row in vocabulary["sizes"]] == [10, 1, 1]
    assert [row["train_unk_share"] for row in vocabulary["sizes"]] == [round(20 / 60, 5), round(9 / 60, 5), 0]
    # a cat; 20 times: a zebra runs; one dog; number: 65 words, of which "zebra", "runs" 20 times each and "one".
    assert vocabulary["sizes"][2]["validation_unk_share"] == round(41 / 65, 5)
    assert vocabulary["sizes"][2]["validation_words_known_share"] == round(4 / 7, 5)
    assert found["same_captions"] == {"within_train": 9, "validation_in_train": {"captions": 1, "share": 0.25}}
    assert [one["path"] for one in found["unreadable_photos"]] == [str(data.parent / "v3.png")]
    assert "v3.png is cut short" in found["unreadable_photos"][0]["reason"]
    names = [[str(data.parent / name) for name in pair] for pair in (("t3.png", "v0.png"), ("t4.png", "v1.jpg"))]
    assert found["same_photos"] == {
        "within_train": 1,
        "within_validation": 0,
        "train_and_validation": {"same": 1, "near": 1, "examples": names},
    }


def test_text_for_a_person(data: Path) -> None:
    text = as_text(report(load_dataset(data, max_missing_share=1.0)))
    lines = text.splitlines()
    assert lines[0] == "set, in its own split"
    assert re.fullmatch(r"train +10 +20 +2 +3\.0 +4 +4 +4 +4", lines[3])
    assert re.fullmatch(r"  2 +50\.0%  #{40}", lines[7])
    assert re.search(r"^ +14 +1 +0\.00% +63\.08%$", text, re.MULTILINE)
    assert "missing      1 photos" in lines
    assert "unreadable   1 photos" in lines
    assert "  1 captions of validation (25.0%) stand in training too" in lines
    assert "  1 photos of validation are in train too, byte for byte; 1 look like one there" in lines
    assert all(len(line) < 200 for line in lines)


def test_command_without_tensorflow(data: Path) -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({TENSORFLOW}, None)); "
    program = blocked + "from caption_train.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", program, "report", str(data), "--json", "--vocabulary", "3"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(result.stdout)
    assert [row["size"] for row in found["vocabulary"]["sizes"]] == [3]
    assert found["same_photos"]["within_train"] == 1


def test_command_without_reading_photos(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(data), "--no-photos", "--limit", "4"]) == 0
    said = capsys.readouterr().out
    assert "unreadable" not in said
    assert re.search(r"^train +4 ", said, re.MULTILINE)
    assert main(["report", str(data), "--max-missing-share", "0"]) == 6
    for photo in data.parent.glob("*.*g"):
        photo.unlink()
    assert main(["report", str(data), "--no-photos", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: part["photos"] for name, part in found["parts"].items()} == {"train": 10, "validation": 5}
    assert "missing_photos" not in found


def test_fingerprints_survive_scaling_and_compression_and_tell_photos_apart() -> None:
    photos = [picture(seed) for seed in range(40)]
    first = [fingerprint(photo) for photo in photos]
    second = []
    for photo in photos:
        buffer = io.BytesIO()
        photo.resize((100, 100)).save(buffer, "JPEG", quality=50)
        second.append(fingerprint(Image.open(buffer)))
    assert near_pairs(first, second) == [(i, i) for i in range(40)]
    assert near_pairs(first, [*second, None, *first]) == sorted(
        [(i, i) for i in range(40)] + [(i, 41 + i) for i in range(40)]
    )
    assert fingerprint(Image.new("RGB", (50, 50), "navy")) is None
    assert near_pairs([None], first) == []


def test_near_pairs_take_little_memory() -> None:
    """All pairs of a set are looked at: 8.5 thousand million of MS-COCO's photos."""
    ours, theirs = np.random.default_rng(0).integers(0, 2**64, (2, 1500, 4), dtype=np.uint64)
    theirs[700] = ours[900] ^ np.array([2**40 - 1, 0, 0, 0], np.uint64)
    theirs[3] = ours[4] ^ np.array([2**40 - 1, 0, 0, 1], np.uint64)
    tracemalloc.start()
    try:
        pairs = near_pairs(list(ours), list(theirs))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pairs == [(900, 700)]
    assert peak < 2**24 + 2**20


@pytest.mark.data
def test_the_real_flickr8k_photos_do_not_all_look_alike(shared: Path) -> None:
    paths = sorted((shared / "flickr8k" / "images").iterdir())[:300]
    facts = look_at(paths)
    bits = [one.fingerprint for one in facts]
    assert [pair for pair in near_pairs(bits, bits) if pair[0] < pair[1]] == []
    assert sum(one.fingerprint is None for one in facts) < 3
