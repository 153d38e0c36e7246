import json
import logging
from pathlib import Path

import pytest

from caption_rt.errors import OptionsError
from caption_train.datasets import CaptionedImage, Dataset, load_dataset, photos_in
from caption_train.errors import DatasetError


def names(images: tuple[CaptionedImage, ...]) -> list[str]:
    return [image.path.name for image in images]


def make_flickr8k(folder: Path, count: int = 10, *, lists: dict[str, list[int]] | None = None) -> Path:
    """Photos 0.jpg, 1.jpg, ... (empty files: nothing here decodes them) with two captions each."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        (folder / "images" / f"{i}.jpg").touch()
        lines += [f"{i}.jpg#0\tA dog , number {i} .", f"{i}.jpg#1\tDog {i}"]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for part, members in (lists or {}).items():
        (folder / f"Flickr_8k.{part}Images.txt").write_text("".join(f"{i}.jpg\n" for i in members), encoding="utf-8")
    return folder


def make_coco(folder: Path, count: int = 10, **changes: object) -> tuple[Path, Path]:
    images = folder / "val"
    images.mkdir(parents=True)
    for i in range(count):
        (images / f"{i:03d}.jpg").touch()
    content = {
        "images": [{"id": i, "file_name": f"{i:03d}.jpg"} for i in range(count)],
        "annotations": [{"image_id": i, "id": i, "caption": f"A cat number {i}.\n"} for i in range(count)],
    }
    path = folder / "captions.json"
    path.write_text(json.dumps(content | changes, indent=0), encoding="utf-8")
    return path, images


def test_flickr8k_in_its_own_split(tmp_path: Path) -> None:
    folder = make_flickr8k(tmp_path, 7, lists={"train": [4, 0, 2], "dev": [5, 1], "test": [3]})
    dataset = load_dataset(folder)
    assert dataset == Dataset(
        name="flickr8k",
        train=tuple(
            CaptionedImage(folder / "images" / f"{i}.jpg", (f"A dog , number {i} .", f"Dog {i}")) for i in (0, 2, 4)
        ),
        validation=dataset.validation,
        missing=0,
        test=dataset.test,
        own_split=True,
    )
    assert names(dataset.validation) == ["1.jpg", "5.jpg"]
    assert names(dataset.test) == ["3.jpg"]  # and 6.jpg, in no list, is in no part


def test_flickr8k_limit_takes_training_photos_only(tmp_path: Path) -> None:
    folder = make_flickr8k(tmp_path, 40, lists={"train": list(range(30)), "dev": list(range(30, 40))})
    whole, some, fewer = (load_dataset(folder, limit=limit, seed=3) for limit in (None, 12, 5))
    assert [len(d.train) for d in (whole, some, fewer)] == [30, 12, 5]
    assert set(fewer.train) < set(some.train) < set(whole.train)
    assert whole.validation == some.validation == fewer.validation
    assert load_dataset(folder, limit=12, seed=3) == some
    assert load_dataset(folder, limit=12, seed=4).train != some.train
    assert load_dataset(folder, limit=100).train == whole.train


def test_flickr8k_without_lists_is_split_by_photo_whatever_the_order_of_lines(tmp_path: Path) -> None:
    folder = make_flickr8k(tmp_path, 50, lists={"test": [0, 1]})
    dataset = load_dataset(folder, seed=1, limit=40)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (32, 8, 2)
    parts = [set(names(part)) for part in (dataset.train, dataset.validation, dataset.test)]
    assert len(set.union(*parts)) == 42
    captions = folder / "Flickr8k.token.txt"
    captions.write_text("\n".join(reversed(captions.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    again = load_dataset(folder, seed=1, limit=40)
    assert [names(again.train), names(again.validation)] == [names(dataset.train), names(dataset.validation)]
    assert names(load_dataset(folder, seed=2, limit=40).validation) != names(dataset.validation)
    assert len(load_dataset(folder, validation_share=0.5).validation) == 24


def test_flickr8k_photos_in_the_sets_misspelt_folder_or_where_the_caller_says(tmp_path: Path) -> None:
    folder = make_flickr8k(tmp_path, 5)
    misspelt = (folder / "images").rename(folder / "Flicker8k_Dataset")
    assert {image.path.parent for image in load_dataset(folder).train} == {misspelt}
    elsewhere = misspelt.rename(tmp_path / "elsewhere")
    assert {image.path.parent for image in load_dataset(folder, images=elsewhere).train} == {elsewhere}
    with pytest.raises(DatasetError, match="no folder of photos named images or Flicker8k_Dataset or Images"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"0.jpg#0\tA dog\n0.jpg#1 A dog without a tab\n", "token.txt, line 2: expected NAME.jpg#K<TAB>caption"),
        (b"0.jpg\tno number\n", "line 1: expected"),
        (b"0.jpg#0\tA dog\n\n0.jpg#0\tA cat\n", "line 3: caption 0 of 0.jpg is there twice, here and in line 1"),
        (b"../0.jpg#0\tA dog\n", "line 1: '../0.jpg' leads out of the folder of photos"),
        (b"0.jpg#0\tA dog\n\n0.jpg#1\tcaf\xe9\n", "line 3: this is not UTF-8"),
        (b"\n", "holds no captions"),
        (b"0.jpg#0\t . \n", "holds no captions"),
    ],
)
def test_flickr8k_captions_that_cannot_be_parsed(tmp_path: Path, content: bytes, complaint: str) -> None:
    folder = make_flickr8k(tmp_path)
    (folder / "Flickr8k.token.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=complaint) as caught:
        load_dataset(folder)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        ({"train": [1, 99], "dev": [2]}, r"trainImages.txt, line 2: 99.jpg has no caption"),
        (
            {"train": [1, 2], "dev": [3, 2]},
            r"devImages.txt, line 2: 2.jpg is listed twice, .* Flickr_8k.trainImages.txt",
        ),
        ({"train": [1, 2]}, r"has Flickr_8k.trainImages.txt but not Flickr_8k.devImages.txt"),
        ({"dev": [1, 2]}, r"has Flickr_8k.devImages.txt but not Flickr_8k.trainImages.txt"),
        ({"train": [1], "dev": []}, "1 photos to train on and 0 to validate on are too few"),
    ],
)
def test_flickr8k_split_lists_that_do_not_serve(tmp_path: Path, lists: dict[str, list[int]], complaint: str) -> None:
    with pytest.raises(DatasetError, match=complaint):
        load_dataset(make_flickr8k(tmp_path, lists=lists))


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    folder = make_flickr8k(tmp_path, lists={"train": [1, 2], "dev": [3]})
    for path in folder.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    dataset = load_dataset(folder)
    assert names(dataset.train) == ["1.jpg", "2.jpg"]
    assert dataset.train[0].captions == ("A dog , number 1 .", "Dog 1")


def test_missing_photos_are_an_error_unless_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_flickr8k(tmp_path, 10, lists={"train": list(range(7)), "dev": [7, 8]})
    for name in ("1.jpg", "8.jpg", "9.jpg"):  # 9.jpg belongs to no part, so nobody misses it
        (folder / "images" / name).unlink()
    with pytest.raises(DatasetError, match=r"2 of the 9 photos .* such as 1.jpg; .*max_missing_share from 0 to 0.223"):
        load_dataset(folder)
    with pytest.raises(DatasetError, match=r"max_missing_share from 0.2 to"):
        load_dataset(folder, max_missing_share=0.2)
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(folder, max_missing_share=0.223)
    assert "2 of the 9 photos" in caplog.text
    assert dataset.missing == 2
    assert (names(dataset.validation), len(dataset.train)) == (["7.jpg"], 6)


def test_no_photo_at_all_is_the_wrong_folder_whatever_is_allowed(tmp_path: Path) -> None:
    path, _ = make_coco(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(DatasetError, match=r"10 of the 10 photos .* none is there"):
        load_dataset(path, images=tmp_path / "other", max_missing_share=1.0)


def test_captions_without_a_word_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_flickr8k(tmp_path, 4)
    with (folder / "Flickr8k.token.txt").open("a", encoding="utf-8") as file:
        file.write("0.jpg#2\t...\n9.jpg#0\t.\n")
        file.write("0.jpg#3\t\N{DOG FACE}\n8.jpg#0\t'\n")  # words, but not for the scores
    dataset = load_dataset(folder)
    found = {image.path.name: image.captions for image in dataset.train + dataset.validation}
    assert found["0.jpg"] == ("A dog , number 0 .", "Dog 0")
    assert sorted(found) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert "4 captions without a word" in caplog.text


def test_coco_is_read_split_and_limited(tmp_path: Path) -> None:
    path, images = make_coco(tmp_path, 30)
    dataset = load_dataset(path, images=images, seed=5)
    assert (dataset.name, dataset.missing, len(dataset.train), len(dataset.validation)) == ("coco", 0, 24, 6)
    assert {i.path for i in dataset.train + dataset.validation} == set(images.iterdir())
    assert all(i.captions == (f"A cat number {int(i.path.stem)}.",) for i in dataset.train)
    limited = load_dataset(path, images=images, seed=5, limit=10)
    assert (len(limited.train), len(limited.validation)) == (8, 2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": None}, "is not COCO's caption format: it has no list 'images'"),
        ({"annotations": {}}, "it has no list 'annotations'"),
        ({"annotations": []}, "holds no captions"),
        (
            {"annotations": [{"image_id": 0, "caption": "A"}, {"image_id": 1}]},
            r"annotations\[1\]: 'caption' is missing",
        ),
        (
            {"annotations": [{"image_id": "0", "caption": "A"}]},
            r"annotations\[0\]: 'image_id' is missing or not of type",
        ),
        ({"annotations": [{"image_id": 77, "caption": "A"}]}, r"annotations\[0\]: there is no image 77"),
        ({"images": [{"id": 1, "file_name": "1.jpg"}] * 2}, r"images\[1\]: the image 1 \(1.jpg\) is there twice"),
        ({"images": ["1.jpg"]}, r"images\[0\]: 'id' is missing"),
        ({"images": [{"id": True, "file_name": "1.jpg"}]}, r"images\[0\]: 'id' is missing or not of type int"),
        ({"images": [{"id": 1, "file_name": "../1.jpg"}]}, r"images\[0\]: '../1.jpg' leads out of the folder"),
        (
            {"annotations": [{"image_id": 0, "id": 7, "caption": "A"}, {"image_id": 1, "id": 7, "caption": "B"}]},
            r"annotations\[1\]: the annotation 7 is there twice",
        ),
    ],
)
def test_coco_files_of_another_shape(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    path, images = make_coco(tmp_path, **changes)
    with pytest.raises(DatasetError, match=complaint):
        load_dataset(path, images=images)


def test_coco_file_that_is_not_json(tmp_path: Path) -> None:
    path, images = make_coco(tmp_path)
    path.write_text('{\n"images": [,\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=r"captions.json, line 2: this is not JSON"):
        load_dataset(path, images=images)


def test_two_photos_are_the_least(tmp_path: Path) -> None:
    path, images = make_coco(tmp_path / "two", 2)
    dataset = load_dataset(path, images=images)
    assert [len(part) for part in (dataset.train, dataset.validation)] == [1, 1]
    with pytest.raises(DatasetError, match="1 photos to train on and 0 to validate on"):
        load_dataset(path, images=images, limit=1)


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"validation_limit": 0},
        {"validation_share": 0.0},
        {"validation_share": 1.0},
        {"max_missing_share": 1.5},
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, float]) -> None:
    path, images = make_coco(tmp_path)
    with pytest.raises(OptionsError):
        load_dataset(path, images=images, **options)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere", "there is no such data set"),
        ("coco/val", "val holds no captions in a known format; give a folder with Flickr8k.token.txt"),
        ("coco/captions.json", "say which folder holds the photos, with --images"),
        ("coco/val/001.jpg", "is no data set"),
    ],
)
def test_load_dataset_on_something_else(tmp_path: Path, name: str, complaint: str) -> None:
    make_coco(tmp_path / "coco")
    with pytest.raises(DatasetError, match=complaint):
        load_dataset(tmp_path / name)


def test_photos_in_a_folder_and_below(tmp_path: Path) -> None:
    taken = ("a/b/d.jpeg", "a/c.PNG", "b.jpg", "c.HEIC", "d.jfif")
    for name in (*taken, "a/notes.txt", ".hidden/e.jpg", ".f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert photos_in(tmp_path) == tuple(tmp_path / name for name in taken)
    with pytest.raises(DatasetError, match="no photo is in this folder"):
        photos_in(tmp_path / "empty")
    with pytest.raises(DatasetError, match="no such folder"):
        photos_in(tmp_path / "b.jpg")


@pytest.mark.data
def test_the_real_flickr8k(shared: Path) -> None:
    dataset = load_dataset(shared / "flickr8k")
    assert (len(dataset.train), len(dataset.validation), dataset.missing) == (6000, 1000, 0)
    assert {len(image.captions) for image in dataset.train + dataset.validation} == {5}
    captions = {image.path.name: image.captions for image in dataset.train + dataset.validation}
    with (shared / "flickr8k" / "Flickr8k.token.txt").open(encoding="utf-8") as file:
        key, caption = next(file).rstrip("\n").split("\t")
    assert captions[key.removesuffix("#0")][0] == caption
    assert len(load_dataset(shared / "flickr8k", limit=300, seed=1).train) == 300


@pytest.mark.data
def test_the_real_coco(shared: Path) -> None:
    annotations, images = shared / "coco" / "captions_val2017.json", shared / "photos" / "images"
    content = json.loads(annotations.read_text(encoding="utf-8"))
    files = {record["id"]: record["file_name"] for record in content["images"]}
    here = {p.name for p in images.iterdir()} & set(files.values())
    with pytest.raises(DatasetError, match=f"{5000 - len(here):,} of the 5,000 photos"):
        load_dataset(annotations, images=images)
    dataset = load_dataset(annotations, images=images, max_missing_share=1.0)
    assert set(names(dataset.train)) | set(names(dataset.validation)) == here
    assert dataset.missing == 5000 - len(here)
    captions = {image.path.name: image.captions for image in dataset.train + dataset.validation}
    expected: dict[str, list[str]] = {name: [] for name in here}
    for record in content["annotations"]:
        if files[record["image_id"]] in here:
            expected[files[record["image_id"]]].append(record["caption"].strip())
    assert captions == {name: tuple(texts) for name, texts in expected.items()}
