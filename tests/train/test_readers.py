"""Formats of caption files beyond Flickr8k's and one of MS-COCO's, and what is wrong with files that people have."""

import csv
import io
import json
import logging
from pathlib import Path

import pytest

from caption_train.datasets import CaptionedImage, Dataset, load_dataset, read_captions
from caption_train.errors import DatasetError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def captions_of(images: tuple[CaptionedImage, ...], folder: Path) -> dict[str, tuple[str, ...]]:
    return {image.path.relative_to(folder).as_posix(): image.captions for image in images}


def coco(path: Path, numbers: range, subset: str) -> None:
    """One of MS-COCO's caption files; the names of 2014 carry the subset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": i, "file_name": f"COCO_{subset}_{i:012d}.jpg"} for i in numbers],
        "annotations": [{"image_id": i, "id": i, "caption": f"A cat {i}"} for i in numbers],
    }
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """As `caption-train fetch coco` leaves it."""
    for subset, numbers in (("train2014", range(8)), ("val2014", range(8, 12))):
        coco(tmp_path / "annotations" / f"captions_{subset}.json", numbers, subset)
        touch(tmp_path / subset, *(f"COCO_{subset}_{i:012d}.jpg" for i in numbers))
    return tmp_path


class TestCocoFolder:
    def test_both_files_are_the_split(self, coco_folder: Path) -> None:
        dataset = load_dataset(coco_folder)
        assert (dataset.name, dataset.own_split) == ("coco", True)
        assert [int(image.path.stem[-12:]) for image in dataset.train] == list(range(8))
        assert [int(image.path.stem[-12:]) for image in dataset.validation] == list(range(8, 12))
        assert {image.path.parent.name for image in dataset.validation} == {"val2014"}
        limited = load_dataset(coco_folder, limit=3, validation_limit=2)
        assert (len(limited.train), len(limited.validation)) == (3, 2)
        assert set(limited.validation) < set(dataset.validation)
        assert load_dataset(coco_folder, images=coco_folder) == dataset

    def test_photos_of_training_alone_as_the_tutorial_has_them(
        self, coco_folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for path in (coco_folder / "val2014").iterdir():
            path.unlink()
        (coco_folder / "val2014").rmdir()
        dataset = load_dataset(coco_folder)
        assert (len(dataset.train), len(dataset.validation), dataset.missing, dataset.own_split) == (6, 2, 0, False)
        assert "captions_val2014.json: its photos are not there" in caplog.text
        assert load_dataset(coco_folder / "annotations" / "captions_train2014.json") == dataset

    def test_files_that_are_no_pair(self, coco_folder: Path) -> None:
        coco(coco_folder / "annotations" / "captions_val2017.json", range(3), "val2017")
        touch(coco_folder / "val2017", "x.jpg")
        with pytest.raises(DatasetError, match=r"captions_val2014.json, captions_val2017.json, which are no pair"):
            load_dataset(coco_folder)

    def test_a_photo_in_both_files(self, coco_folder: Path) -> None:
        path = coco_folder / "annotations" / "captions_val2014.json"
        path.write_bytes((coco_folder / "annotations" / "captions_train2014.json").read_bytes())
        with pytest.raises(
            DatasetError, match=r"captions_val2014.json: the photo COCO_train2014_0+.jpg is in the other"
        ):
            load_dataset(coco_folder)


def karpathy(**changes: object) -> dict[str, object]:
    image = {
        "filepath": "val2014",
        "filename": "a.jpg",
        "split": "test",
        "sentences": [{"raw": "A cat. ", "tokens": []}],
    }
    return image | changes


def write_karpathy(folder: Path, images: list[object], **more: object) -> Path:
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, **more}), encoding="utf-8")
    return path


class TestKarpathy:
    def test_the_parts_are_the_files_own(self, tmp_path: Path) -> None:
        parts = ["train", "restval", "val", "test"]
        images: list[object] = [karpathy(filename=f"{part}.jpg", split=part) for part in parts]
        path = write_karpathy(tmp_path, [*images, karpathy(filepath="train2014", split="train")], dataset="coco")
        touch(tmp_path, "train2014/a.jpg", *(f"val2014/{part}.jpg" for part in parts))
        for dataset in (load_dataset(path), load_dataset(tmp_path), load_dataset(path, images=tmp_path)):
            assert (dataset.name, dataset.own_split) == ("coco", True)
            assert list(captions_of(dataset.train, tmp_path)) == [
                "train2014/a.jpg",
                "val2014/restval.jpg",
                "val2014/train.jpg",
            ]
            assert captions_of(dataset.validation, tmp_path) == {"val2014/val.jpg": ("A cat.",)}
            assert captions_of(dataset.test, tmp_path) == {"val2014/test.jpg": ("A cat.",)}

    def test_of_flickr_without_folders_in_it(self, tmp_path: Path) -> None:
        images: list[object] = []
        for name, part in (("1.jpg", "train"), ("2.jpg", "val")):
            image = karpathy(filename=name, split=part)
            del image["filepath"]
            images.append(image)
        path = write_karpathy(tmp_path, images, dataset="flickr8k")
        touch(tmp_path / "Flicker8k_Dataset", "1.jpg", "2.jpg")
        assert load_dataset(path).name == "flickr8k"
        assert load_dataset(path).train[0].path == tmp_path / "Flicker8k_Dataset" / "1.jpg"

    @pytest.mark.parametrize(
        ("image", "complaint"),
        [
            (karpathy(split="extra"), r"images\[1\]: the split 'extra' is not known; the words are train, "),
            (karpathy(split=None), r"images\[1\]: 'split' is missing or not of type str"),
            (karpathy(filename=None), r"images\[1\]: 'filename' is missing"),
            (karpathy(sentences="A cat"), r"images\[1\]: 'sentences' is missing or not of type list"),
            (karpathy(sentences=[{"raw": "A"}, {}]), r"images\[1\], sentences\[1\]: 'raw' is missing"),
            (karpathy(filepath="../.."), r"images\[1\]: '../../a.jpg' leads out of the folder of photos"),
            (karpathy(filename="first.jpg"), r"images\[1\]: the photo val2014/first.jpg is there twice"),
            ("a.jpg", r"images\[1\]: 'filename' is missing"),
        ],
    )
    def test_malformed(self, tmp_path: Path, image: object, complaint: str) -> None:
        path = write_karpathy(tmp_path, [karpathy(filename="first.jpg"), image])
        with pytest.raises(DatasetError, match=f"dataset_coco.json, {complaint}"):
            load_dataset(path)


class TestFlickr30k:
    RESULTS = (
        "image_name| comment_number| comment\n"
        "1.jpg| 0| Two young guys with shaggy hair | one bar more .\n"
        "1.jpg| 1|A dog , running .\n"
        "2199200615.jpg| 4   A dog runs across the grass .\n"  # as it stands in the file that is passed on
    )

    def test_results_csv(self, tmp_path: Path) -> None:
        (tmp_path / "results.csv").write_text(self.RESULTS, encoding="utf-8")
        touch(tmp_path / "flickr30k_images", "1.jpg", "2199200615.jpg")
        dataset = load_dataset(tmp_path)
        assert (dataset.name, dataset.own_split) == ("flickr30k", False)
        assert captions_of(dataset.train + dataset.validation, tmp_path / "flickr30k_images") == {
            "1.jpg": ("Two young guys with shaggy hair | one bar more .", "A dog , running ."),
            "2199200615.jpg": ("A dog runs across the grass .",),
        }
        assert load_dataset(tmp_path / "results.csv") == dataset

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("3.jpg| x| A dog", r"line 5: expected NAME.jpg\| K\| caption, found '3.jpg\| x\| A dog'"),
            ("1.jpg| 1| Again", "line 5: caption 1 of 1.jpg is there twice, here and in line 3"),
            ("/etc/3.jpg| 0| A dog", "line 5: '/etc/3.jpg' leads out of the folder of photos"),
        ],
    )
    def test_malformed_results(self, tmp_path: Path, line: str, complaint: str) -> None:
        (tmp_path / "results.csv").write_text(self.RESULTS + line, encoding="utf-8")
        with pytest.raises(DatasetError, match=f"results.csv, {complaint}"):
            load_dataset(tmp_path)

    def test_token_file(self, tmp_path: Path) -> None:
        lines = [f"{i}.jpg#{k}\tCaption {k} of {i} ." for i in range(5) for k in range(5)]
        (tmp_path / "results_20130124.token").write_text("\n".join(lines), encoding="utf-8")
        touch(tmp_path / "flickr30k-images", *(f"{i}.jpg" for i in range(5)))
        dataset = load_dataset(tmp_path)
        assert (dataset.name, len(dataset.train), len(dataset.validation)) == ("flickr30k", 4, 1)
        assert dataset.validation[0].captions[3].startswith("Caption 3 of ")


def table(folder: Path, name: str, content: str | bytes, *photos: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    touch(folder, *(photos or ("a.jpg", "b/c.jpg")))
    return path


EXPECTED = {"a.jpg": ("A dog, running", "Ein Hündchen läuft"), "b/c.jpg": ("A cat",)}
JSON_CELL = '"[""A dog, running"", ""Ein Hündchen läuft""]"'


class TestTables:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("t.csv", 'image,caption\na.jpg,"A dog, running"\na.jpg,Ein Hündchen läuft\nb/c.jpg,A cat\n'),
            ("t.csv", '\ufeffimage,caption\r\na.jpg,"A dog, running"\r\n\r\na.jpg,Ein Hündchen läuft\r\nb/c.jpg,A cat'),
            ("t.csv", 'a.jpg,"A dog, running"\na.jpg,Ein Hündchen läuft\nb/c.jpg,A cat\n'),
            ("t.tsv", "file_name\tcaption\na.jpg\tA dog, running\na.jpg\tEin Hündchen läuft\nb/c.jpg\tA cat\n"),
            ("t.csv", "id;Caption;Image\n1;A dog, running;a.jpg\n2; Ein Hündchen läuft ;a.jpg\n3;A cat;b/c.jpg\n"),
            ("t.csv", 'image,caption_0,caption_1\na.jpg,"A dog, running",Ein Hündchen läuft\nb/c.jpg,A cat,\n'),
            ("t.csv", f"image,captions\na.jpg,{JSON_CELL}\nb/c.jpg,A cat\n"),
            ("t.csv", 'image,captions\na.jpg,"[ ""A dog, running"", ""Ein Hündchen läuft"" ]"\nb/c.jpg,A cat\n'),
            ("t.csv", "image;captions\na.jpg;['A dog, running', 'Ein Hündchen läuft']\nb/c.jpg;['A cat']\n"),
            ("captions.txt", 'image,caption\na.jpg,"A dog, running"\na.jpg,Ein Hündchen läuft\n./b/c.jpg,A cat\n'),
            (
                "t.jsonl",
                '{"image": "a.jpg", "captions": ["A dog, running", "Ein Hündchen läuft"]}\n\n'
                '{"image": "b/c.jpg", "caption": "A cat", "id": 3}\n',
            ),
            (
                "t.jsonl",
                '\ufeff{"caption": "A dog, running", "image": "a.jpg"}\r\n'
                '{"image": "a.jpg", "caption": "Ein H\\u00fcndchen l\\u00e4uft"}\r\n'
                '{"image": "b/c.jpg", "caption": "A cat"}',
            ),
        ],
    )
    def test_one_row_a_caption_or_a_photo(self, tmp_path: Path, name: str, content: str) -> None:
        dataset = load_dataset(table(tmp_path, name, content))
        assert captions_of(dataset.train + dataset.validation, tmp_path) == EXPECTED
        assert (dataset.own_split, dataset.missing) == (False, 0)

    def test_the_name_is_the_files_or_its_folders(self, tmp_path: Path) -> None:
        content = "a.jpg,A dog\nb/c.jpg,A cat\n"
        assert load_dataset(table(tmp_path / "pets", "mine.csv", content)).name == "mine"
        assert load_dataset(table(tmp_path / "garden", "captions.csv", content).parent).name == "garden"

    def test_a_column_of_parts(self, tmp_path: Path) -> None:
        rows = [("1.jpg", "train"), ("2.jpg", "VAL"), ("2.jpg", "dev"), ("3.jpg", "test"), ("4.jpg", "training")]
        content = "image,caption,split\n" + "".join(f"{name},A dog,{part}\n" for name, part in rows)
        dataset = load_dataset(table(tmp_path, "t.csv", content, *(name for name, _ in rows)))
        assert dataset.own_split
        assert list(captions_of(dataset.train, tmp_path)) == ["1.jpg", "4.jpg"]
        assert captions_of(dataset.validation, tmp_path) == {"2.jpg": ("A dog", "A dog")}
        assert list(captions_of(dataset.test, tmp_path)) == ["3.jpg"]

    def test_training_and_test_alone_have_validation_drawn_from_training(self, tmp_path: Path) -> None:
        lines = [
            json.dumps({"image": f"{i}.jpg", "caption": "A", "split": "test" if i > 9 else "train"}) for i in range(13)
        ]
        dataset = load_dataset(table(tmp_path, "t.jsonl", "\n".join(lines), *(f"{i}.jpg" for i in range(13))))
        assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [8, 2, 3]
        assert not dataset.own_split

    def test_a_list_as_pandas_writes_it(self, tmp_path: Path) -> None:
        """With the quotes that each caption leaves free, and with escapes."""
        captions = ["The dog's ball", 'A "dog"', 'It\'s "one"', "Two\nlines\\"]
        buffer = io.StringIO()
        csv.writer(buffer).writerows(
            [("image", "captions"), ("a.jpg", repr(captions)), ("b/c.jpg", repr(captions[:1]))]
        )
        (found, other) = read_captions(table(tmp_path, "t.csv", buffer.getvalue())).records
        assert (found.captions, other.captions) == (tuple(captions), tuple(captions[:1]))

    @pytest.mark.parametrize(
        ("name", "content", "complaint"),
        [
            ("t.csv", "image,caption\na.jpg,A dog, running\n", "line 2: expected 2 columns, found 3; put captions"),
            ("t.csv", "image,caption\n\na.jpg\n", "line 3: expected 2 columns, found 1"),
            (
                "t.csv",
                'image,caption\na.jpg,"A dog\nb/c.jpg,A cat\n',
                "line 2: this is not CSV: unexpected end of data",
            ),
            ("t.csv", 'image,caption\na.jpg,"A" dog\n', "line 2: this is not CSV"),
            ("t.csv", f"image,caption\na.jpg,{'x' * 200_000}\n", "line 2: this is not CSV: field larger than"),
            ("t.csv", "image,caption\n../a.jpg,A dog\n", "line 2: '../a.jpg' leads out of the folder of photos"),
            ("t.csv", "image,caption\nC:\\a.jpg,A dog\n", r"line 2: 'C:\\\\a.jpg' leads out of the folder"),
            ("t.csv", "image,caption\n ,A dog\n", "line 2: ' ' is no file name of a photo"),
            ("t.csv", "image,caption\na\0.jpg,A dog\n", "line 2: "),
            (
                "t.csv",
                "image,caption,split\na.jpg,A dog,train\na.jpg,A dog,val\n",
                "line 3: a.jpg is put into validation",
            ),
            ("t.csv", "image,caption,split\na.jpg,A dog,\n", "line 2: the split '' is not known"),
            ("t.csv", 'image,captions\na.jpg,"[""A"", 3]"\n', "line 2: expected a list of captions"),
            ("t.csv", 'image,captions\na.jpg,"[""A"""\n', "line 2: expected a list of captions"),
            ("t.csv", "image;captions\na.jpg;['A', 3]\n", "line 2: expected a list of captions"),
            ("t.csv", "image;captions\na.jpg;['A' 'B']\n", "line 2: expected a list of captions"),  # as NumPy prints it
            ("t.csv", "image;captions\na.jpg;['A\\x']\n", "line 2: expected a list of captions"),
            ("t.csv", "picture,words\na.jpg,A dog\n", "line 1: expected a header such as image,caption"),
            ("t.csv", "", "line 1: expected a header"),
            ("t.csv", "image,caption\n", "holds no captions"),
            ("t.csv", "image,caption\na.jpg,\n", "holds no captions"),
            ("t.csv", b"image,caption\na.jpg,caf\xe9\n", "line 2: this is not UTF-8 text"),
            ("t.csv", "image,caption\na.jpg,A\n".encode("utf-16"), "line 1: this is not UTF-8 text"),
            ("t.txt", "Some notes, and more\n", "line 1: expected a header"),
            ("t.jsonl", '{"image": "a.jpg", "caption": "A"}\n{"image":\n', "line 2: this is not JSON"),
            ("t.jsonl", '["a.jpg", "A"]\n', "line 1: expected an object such as"),
            ("t.jsonl", '{"image": "a.jpg"}\n', "line 1: expected an object such as"),
            ("t.jsonl", '{"image": "a.jpg", "caption": null}\n', "line 1: photo, captions and split have to be texts"),
            ("t.jsonl", '{"image": 3, "caption": "A"}\n', "line 1: photo, captions and split have to be texts"),
            ("t.jsonl", '{"image": "a.jpg", "captions": ["A", ["B"]]}\n', "line 1: photo, captions and split"),
            ("t.jsonl", "[" * 100_000 + "\n", "line 1: this is no"),
            ("t.json", "[" * 100_000, "this is no"),
            ("t.json", '{"images": [{"id": ' + "9" * 5000 + "}]}", "this is no"),
            ("t.json", '{"some": "JSON"}', "is not COCO's caption format: it has no list 'images'"),
            ("t.json", "[]", "it has no list 'images'"),
            ("t.json", "", "this is not JSON"),
        ],
    )
    def test_malformed(self, tmp_path: Path, name: str, content: str | bytes, complaint: str) -> None:
        path = table(tmp_path, name, content)
        with pytest.raises(DatasetError, match=complaint) as caught:
            load_dataset(path)
        assert str(path) in str(caught.value)

    def test_a_photo_in_no_part_beside_those_in_parts(self, tmp_path: Path) -> None:
        lines = [
            '{"image": "1.jpg", "caption": "A", "split": "train"}',
            '{"image": "2.jpg", "caption": "A", "split": "val"}',
        ]
        lines.append('{"image": "3.jpg", "caption": "A"}')
        path = table(tmp_path, "t.jsonl", "\n".join(lines), "1.jpg", "2.jpg", "3.jpg")
        with pytest.raises(DatasetError, match=r"1 photos are in no part, such as 3\.jpg"):
            load_dataset(path)


def test_captions_of_any_length_and_alphabet_are_kept_as_written(tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(200))
    rows = [{"image": "1.jpg", "caption": long}, {"image": "2.jpg", "captions": ["犬が走る", "Пёс \u2028 бежит", "  "]}]
    path = table(tmp_path, "t.jsonl", "\n".join(json.dumps(row) for row in rows), "1.jpg", "2.jpg")
    dataset = load_dataset(path)
    assert captions_of(dataset.train + dataset.validation, tmp_path) == {
        "1.jpg": (long,),
        "2.jpg": ("犬が走る", "Пёс \u2028 бежит"),
    }
    assert dataset.wordless == 1


def test_photos_without_a_caption_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco(tmp_path / "captions_val2014.json", range(4), "val2014")
    content = json.loads((tmp_path / "captions_val2014.json").read_text(encoding="utf-8"))
    content["annotations"] = [*content["annotations"][:2], {"image_id": 3, "caption": " ... "}]
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content), encoding="utf-8")
    touch(tmp_path / "val2014", *(f"COCO_val2014_{i:012d}.jpg" for i in range(4)))
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.validation), dataset.missing, dataset.wordless) == (1, 1, 0, 1)
    assert "1 captions without a word are left out" in caplog.text
    assert "2 photos without a caption are left out" in caplog.text


def test_photos_of_equal_names_in_several_folders_are_drawn_apart(tmp_path: Path) -> None:
    names = [f"{folder}/photo.jpg" for folder in "abcdefghij"]
    lines = [f"{name},A dog" for name in names]
    first = load_dataset(table(tmp_path, "t.csv", "\n".join(lines), *names))
    again = load_dataset(table(tmp_path, "t.csv", "\n".join(reversed(lines)), *names))
    assert first == again
    assert len(first.validation) == 2


def test_a_folder_of_several_sets_or_of_none(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no captions in a known format"):
        load_dataset(tmp_path)
    table(tmp_path, "captions.csv", "a.jpg,A dog\nb/c.jpg,A cat\n")
    write_karpathy(tmp_path, [karpathy()])
    with pytest.raises(DatasetError, match=r"several data sets \(captions.csv, dataset_coco.json\); name the file"):
        load_dataset(tmp_path)


def test_captions_alone(tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", "image,caption\nnowhere.jpg, A dog \nnowhere.jpg,\n")
    captions = read_captions(path)
    assert [(record.name, record.captions, record.part) for record in captions.records] == [
        ("nowhere.jpg", ("A dog", ""), None)
    ]


@pytest.mark.data
def test_the_real_coco_file_in_every_other_format(shared: Path, tmp_path: Path) -> None:
    """The same photos and captions, whatever file they are written down in."""
    images = shared / "photos" / "images"
    real = load_dataset(shared / "coco" / "captions_val2017.json", images=images, max_missing_share=1.0)
    everything = sorted(real.train + real.validation, key=lambda image: image.path)
    rows = [(image.path.name, caption) for image in everything for caption in image.captions]
    assert len(rows) == 100
    quoted = ['"' + caption.replace('"', '""') + '"' for _, caption in rows]
    numbers = [k for image in everything for k in range(len(image.captions))]
    files = {
        "t.csv": "image,caption\n" + "\n".join(f"{name},{text}" for (name, _), text in zip(rows, quoted, strict=True)),
        "t.jsonl": "\n".join(json.dumps({"image": i.path.name, "captions": i.captions}) for i in everything),
        "t.token": "\n".join(f"{name}#{k}\t{text}" for (name, text), k in zip(rows, numbers, strict=True)),
        "t.json": json.dumps(
            {
                "images": [
                    {"filename": i.path.name, "split": "train", "sentences": [{"raw": c} for c in i.captions]}
                    for i in everything
                ]
            }
        ),
    }

    def photos(dataset: Dataset) -> list[CaptionedImage]:
        return sorted(dataset.train + dataset.validation, key=lambda image: image.path)

    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        again = load_dataset(tmp_path / name, images=images)
        assert photos(again) == everything, name
        assert (again.train, again.validation) == (real.train, real.validation), name
