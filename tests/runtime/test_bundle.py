"""The bundle: written wholly or not at all, read strictly, never believed."""

import hashlib
import json
import os
import shutil
import zipfile

import onnx
import pytest

import caption_rt.bundle
from bundles import edit_manifest, replace_file
from caption_rt.bundle import (
    Bundle,
    DecodingSpec,
    FileSpec,
    GridSpec,
    Manifest,
    copy_bundle,
    default_bundle_path,
    write_bundle,
)
from caption_rt.errors import BundleError, CaptionError
from caption_rt.vocabulary import Vocabulary

FILES = ["README.md", "decoder.onnx", "encoder.onnx", "extractor.onnx", "selftest.json", "vocabulary.json"]


def arguments(bundle):
    """The arguments of write_bundle that make the same bundle again."""
    fields = (
        *("name", "description", "license", "precisions", "image", "grid", "recurrence", "special_ids", "decoding"),
        *("training", "scores", "versions"),
    )
    manifest = bundle.manifest
    contents = {name: bundle.read(name) for name in manifest.files}
    return {field: getattr(manifest, field) for field in fields} | {"contents": contents}


def zip_folder(folder, archive, prefix=""):
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.iterdir()):
            file.write(path, prefix + path.name)
    return archive


def test_the_committed_bundle_is_what_its_script_makes(tiny, tiny_bundle, tmp_path):
    tiny.make(tmp_path / "made")
    assert sorted(path.name for path in tiny_bundle.iterdir()) == sorted([*FILES, "manifest.json"])
    for path in tiny_bundle.iterdir():
        assert (tmp_path / "made" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_bundle_states_its_facts(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    manifest = bundle.manifest
    assert bundle.path == tiny_bundle
    assert sorted(manifest.files) == FILES
    assert manifest.image.size == 32
    assert manifest.grid == GridSpec(rows=2, columns=3, channels=5)
    assert manifest.decoding == DecodingSpec(beam_size=1, length_penalty=0.0, max_words=8)
    assert manifest.recurrence == "carry"
    assert manifest.special_ids == {"pad": 4, "unk": 11, "start": 8, "end": 1}
    assert manifest.precisions["fp32"]["decoder"].inputs[2].name == "features"
    assert manifest.precisions["fp32"]["decoder"].inputs[2].shape == ("m", 6, 6)
    assert bundle.vocabulary.words[:4] == ("a", "<end>", "cat", "dog")
    assert len(bundle.selftest()["inputs"]) == 2
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_read_gives_the_verified_bytes_each_time(copy):
    bundle = Bundle.open(copy)
    good = (copy / "decoder.onnx").read_bytes()
    assert bundle.read("decoder.onnx") == good
    assert bundle.read("decoder.onnx") == good
    (copy / "decoder.onnx").write_bytes(good[:-1] + b"!")
    with pytest.raises(BundleError, match=r"decoder.onnx is damaged or was changed"):
        bundle.read("decoder.onnx")
    # What was verified at opening is what is handed out, even if the file changed since.
    (copy / "encoder.onnx").write_bytes(b"changed")
    assert hashlib.sha256(bundle.read("encoder.onnx")).hexdigest() == bundle.manifest.files["encoder.onnx"].sha256
    with pytest.raises(BundleError, match=r"the manifest lists no file \.\./secret"):
        bundle.read("../secret")


@pytest.fixture
def two_precisions(copy):
    """The copy with an int8 whose encoder alone is a file of its own."""
    graph = onnx.load(copy / "encoder.onnx")
    graph.ClearField("producer_name")
    (copy / "encoder-int8.onnx").write_bytes(b"")

    def change(data):
        data["precisions"]["int8"] = json.loads(json.dumps(data["precisions"]["fp32"]))
        data["precisions"]["int8"]["encoder"]["file"] = "encoder-int8.onnx"

    edit_manifest(copy, change)
    replace_file(copy, "encoder-int8.onnx", graph.SerializeToString())
    return copy


def test_precisions_may_share_files(two_precisions):
    bundle = Bundle.open(two_precisions)
    assert list(bundle.manifest.precisions) == ["fp32", "int8"]
    files = {name: [graph.file for graph in graphs.values()] for name, graphs in bundle.manifest.precisions.items()}
    assert files["fp32"] == ["extractor.onnx", "encoder.onnx", "decoder.onnx"]
    assert files["int8"] == ["extractor.onnx", "encoder-int8.onnx", "decoder.onnx"]
    assert Manifest.from_json(json.loads(json.dumps(bundle.manifest.to_json()))) == bundle.manifest
    assert bundle.read("encoder-int8.onnx") == (two_precisions / "encoder-int8.onnx").read_bytes()
    # What only the larger precision needs was verified and let go: it is read, and verified, again.
    assert hashlib.sha256(bundle.read("encoder.onnx")).hexdigest() == bundle.manifest.files["encoder.onnx"].sha256
    (two_precisions / "encoder.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"encoder.onnx is shorter than"):
        bundle.read("encoder.onnx")
    with pytest.raises(BundleError, match=r"encoder.onnx is shorter than"):
        Bundle.open(two_precisions)


def test_precisions_have_the_same_tensors(two_precisions):
    def change(data):
        for tensor in data["precisions"]["int8"]["encoder"]["outputs"][:1]:
            tensor["shape"] = ["n", 6, 7]

    edit_manifest(two_precisions, change)
    with pytest.raises(BundleError, match="features has another shape in the encoder graph than before"):
        Bundle.open(two_precisions)


@pytest.mark.parametrize("prefix", ["", "tiny/"])
def test_a_zip_of_the_files_or_of_the_folder_opens(tiny_bundle, tmp_path, prefix):
    archive = zip_folder(tiny_bundle, tmp_path / "tiny.zip", prefix)
    bundle, folder = Bundle.open(archive), Bundle.open(tiny_bundle)
    assert bundle.manifest == folder.manifest
    for _ in range(2):
        assert bundle.read("extractor.onnx") == folder.read("extractor.onnx")


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert str(caught.value).startswith(f"the bundle {copy}: {name} is damaged or was changed")
    with pytest.raises(BundleError, match="is damaged or was changed"):
        Bundle.open(zip_folder(copy, copy.with_suffix(".zip")))


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(copy)


def test_a_file_of_another_length_is_found_without_reading_on(copy):
    with (copy / "README.md").open("ab") as file:
        file.write(b"more")
    with pytest.raises(BundleError, match=r"README.md is longer than the \d+ bytes"):
        Bundle.open(copy)
    (copy / "README.md").write_bytes(b"less")
    with pytest.raises(BundleError, match=r"README.md is shorter than the \d+ bytes"):
        Bundle.open(copy)


def test_what_is_wrong_comes_with_what_to_do(copy):
    again = "; copy it again from its source, or export the model again"
    (copy / "decoder.onnx").unlink()
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert str(caught.value) == f"the bundle {copy}: decoder.onnx is missing{again}"
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert str(caught.value) == f"the bundle {copy}: manifest.json: the key format_version is missing{again}"


def test_a_newer_format_is_refused_with_what_to_do(copy):
    edit_manifest(copy, lambda data: data.update(format_version=2))
    with pytest.raises(BundleError, match="has format 2 and this caption-rt reads 1: pip install -U caption-rt brings"):
        Bundle.open(copy)
    edit_manifest(copy, lambda data: data.update(format_version=0))
    with pytest.raises(BundleError, match="reads 1: export the model again"):
        Bundle.open(copy)


REQUIRED = [
    *("format_version", "name", "description", "license", "files", "precisions", "image", "grid", "recurrence"),
    *("special_ids", "decoding", "training", "scores", "versions"),
    *("image.size", "image.resize", "image.color", "grid.rows", "grid.columns", "grid.channels"),
    *("special_ids.pad", "special_ids.unk", "special_ids.start", "special_ids.end"),
    *("decoding.beam_size", "decoding.length_penalty", "decoding.max_words"),
    *(
        "precisions.fp32.extractor",
        "precisions.fp32.encoder",
        "precisions.fp32.decoder",
        "precisions.fp32.decoder.file",
        "precisions.fp32.encoder.inputs",
    ),
    *("files.README.md.size", "files.README.md.sha256"),
]


@pytest.mark.parametrize("path", REQUIRED)
def test_each_required_key_is_required_and_named(copy, path):
    *parents, key = path.replace("README.md", "README").split(".")

    def find(data):
        for parent in parents:
            data = data["README.md" if parent == "README" else parent]
        return data

    edit_manifest(copy, lambda data: find(data).pop(key))
    with pytest.raises(BundleError, match=f"the key {key} is missing"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", 3, "name is not a string"),
        ("grid", [], "grid is not a JSON object"),
        ("grid.rows", 0, "grid: rows is not a whole number of at least 1"),
        ("grid.rows", 2.0, "grid: rows is not a whole number"),
        ("grid.rows", True, "grid: rows is not a whole number"),
        ("grid.columns", 4, "the shape of grid contradicts image and grid"),
        ("image.size", 64, "the shape of images contradicts image and grid"),
        ("image.resize", "nearest", "image: resize is 'nearest', not one of bilinear"),
        ("recurrence", "sometimes", "recurrence is 'sometimes', not one of carry, reset"),
        ("decoding.beam_size", 0, "decoding: beam_size is not a whole number of at least 1"),
        ("decoding.length_penalty", "much", "decoding: length_penalty is not a number"),
        ("special_ids.end", 2, "the special ids of manifest.json and vocabulary.json differ"),
        ("files.extractor", {"sha256": "0" * 64, "size": 1}, "extractor is missing"),
        ("precisions.fp32.decoder.file", "other.onnx", "files does not list other.onnx"),
        (
            "precisions.fp32.decoder.inputs",
            [],
            "the decoder graph must go from token, state, features, keys to log_probs",
        ),
    ],
)
def test_wrong_values_are_named(copy, path, value, message):
    *parents, key = path.split(".")

    def change(data):
        for parent in parents:
            data = data[parent]
        data[key] = value

    edit_manifest(copy, change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "field", "value", "message"),
    [
        (("encoder", "inputs", 0), "name", "grids", "the encoder graph must go from grid to features"),
        (("decoder", "inputs", 0), "dtype", "float32", "token of the decoder graph must be int64"),
        (("decoder", "inputs", 0), "dtype", "float16", "dtype is 'float16', not one of uint8, float32, int64"),
        (("decoder", "inputs", 3), "shape", ["m", 6, 5], "keys has another shape in the decoder graph than before"),
        (("encoder", "outputs", 2), "shape", ["n", 8], "state has another shape in the decoder graph than before"),
        (("decoder", "outputs", 2), "shape", ["m", 2, 3], "the shape of attention contradicts image and grid"),
        (("decoder", "outputs", 2), "shape", [1, 6], "shape does not begin with the name of the batch axis"),
        (("decoder", "outputs", 2), "shape", ["m", -6], "shape has an axis that is not a whole number above 0"),
        (("decoder", "outputs", 0), "shape", ["m", 17], "decoder.onnx: the output log_probs is float32 ['any', 16]"),
    ],
)
def test_tensors_must_fit_together(copy, tensor, field, value, message):
    graph, side, index = tensor
    edit_manifest(copy, lambda data: data["precisions"]["fp32"][graph][side][index].__setitem__(field, value))
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../outside.onnx", "/etc/passwd", "a/../../b", "sub/graph.onnx", "..", ".hidden", "a\\b", "C:x", "a\nb", ""],
)
def test_a_name_that_could_leave_the_bundle_is_refused(copy, name):
    outside = copy.parent / "outside.onnx"
    outside.write_bytes((copy / "decoder.onnx").read_bytes())

    def change(data):
        data["precisions"]["fp32"]["decoder"]["file"] = name
        data["files"][name] = data["files"].pop("decoder.onnx")

    edit_manifest(copy, change)
    with pytest.raises(BundleError, match="is not the name of a file inside the bundle") as caught:
        Bundle.open(copy)
    assert "\n" not in str(caught.value)


def test_links_are_not_followed(copy, tmp_path):
    shutil.move(copy / "decoder.onnx", tmp_path / "elsewhere.onnx")
    (copy / "decoder.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match=r"decoder.onnx is not a regular file, and links are not followed"):
        Bundle.open(copy)
    (copy / "decoder.onnx").unlink()
    archive = zip_folder(copy, tmp_path / "link.zip")
    with zipfile.ZipFile(archive, "a") as file:
        entry = zipfile.ZipInfo("decoder.onnx")
        entry.external_attr = 0o120777 << 16
        file.writestr(entry, str(tmp_path / "elsewhere.onnx"))
    with pytest.raises(BundleError, match=r"decoder.onnx is not a regular file, and links are not followed"):
        Bundle.open(archive)


def test_a_zip_bomb_is_read_no_further_than_the_stated_size(copy, tmp_path):
    (copy / "README.md").write_bytes(bytes(50_000_000))
    archive = zip_folder(copy, tmp_path / "bomb.zip")
    with pytest.raises(BundleError, match=r"README.md is longer than the \d+ bytes"):
        Bundle.open(archive)
    edit_manifest(copy, lambda data: data["files"]["README.md"].update(size=2**40))
    with pytest.raises(BundleError, match="size is above 2147483648 bytes"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "manifest.json is not valid JSON"),
        (b"{", "manifest.json is not valid JSON"),
        (b"\xff\xfe", "manifest.json is not valid JSON"),
        (b'{"format_version": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "manifest.json is not valid JSON"),
        (b"[]", "manifest.json is not a JSON object"),
        (b" " * 5_000_000, "manifest.json is above 4194304 bytes"),
    ],
)
def test_a_manifest_that_is_not_one(copy, data, message):
    (copy / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_vocabulary_or_selftest_is_refused(copy):
    replace_file(copy, "vocabulary.json", json.dumps(Vocabulary.build(["a cat"]).to_json()).encode())
    with pytest.raises(BundleError, match="16 log-probabilities for 6 words"):
        Bundle.open(copy)
    replace_file(copy, "vocabulary.json", b'{"words": []}')
    with pytest.raises(BundleError, match="the vocabulary has no <pad>"):
        Bundle.open(copy)


def test_a_selftest_must_be_an_object(copy):
    replace_file(copy, "selftest.json", b"[1]")
    with pytest.raises(BundleError, match=r"selftest.json is not a JSON object"):
        Bundle.open(copy).selftest()


def test_what_is_no_bundle_says_so(tmp_path):
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("letter.txt", "no bundle")
    for name, message in {
        "missing": "missing does not exist",
        "empty": "manifest.json is missing",
        "text.zip": "is not a bundle, neither a folder nor a whole zip file: name what caption-export wrote",
        "other.zip": "holds 0 files manifest.json: name the zip file of one bundle",
        "zero\0byte": "zero\\x00byte",
    }.items():
        with pytest.raises(BundleError) as caught:
            Bundle.open(tmp_path / name)
        assert message in str(caught.value)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BundleError, match="neither a folder nor"):
            Bundle.open(tmp_path / "pipe")


def test_a_zip_cut_anywhere_is_a_bundle_error(tiny_bundle, tmp_path):
    data = zip_folder(tiny_bundle, tmp_path / "whole.zip").read_bytes()
    cut = tmp_path / "cut.zip"
    for length in range(0, len(data), 499):
        cut.write_bytes(data[:length])
        with pytest.raises(BundleError):
            Bundle.open(cut)
    # Any bit of it flipped: refused, or without effect (a time stamp in the archive's own directory).
    for position in range(0, len(data), 61):
        cut.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        try:
            bundle = Bundle.open(cut)
        except BundleError:
            continue
        assert bundle.manifest == Bundle.open(tiny_bundle).manifest


def test_writing_again_gives_the_same_bytes(tiny_bundle, tmp_path):
    written = write_bundle(tmp_path / "deep" / "new", **arguments(Bundle.open(tiny_bundle)))
    assert written.path == tmp_path / "deep" / "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    for path in tiny_bundle.iterdir():
        assert (written.path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("packed", [False, True])
def test_a_copy_has_the_same_bytes_and_nothing_else(copy, tmp_path, packed):
    files = {path.name: path.read_bytes() for path in copy.iterdir()}
    (copy / "left-over.txt").write_text("not listed")
    bundle = Bundle.open(zip_folder(copy, tmp_path / "copy.zip") if packed else copy)
    copied = copy_bundle(bundle, tmp_path / "deep" / "new")
    assert {path.name: path.read_bytes() for path in copied.path.iterdir()} == files
    assert copied.sha256 == bundle.sha256 == hashlib.sha256(bundle.read("manifest.json")).hexdigest()
    with pytest.raises(BundleError, match="exists already"):
        copy_bundle(bundle, copied.path)
    assert copy_bundle(bundle, copied.path, overwrite=True).sha256 == bundle.sha256
    assert os.listdir(tmp_path / "deep") == ["new"]


def test_a_copy_of_what_changed_is_not_made(copy, tmp_path):
    bundle = Bundle.open(copy)
    edit_manifest(copy, lambda data: data.update(name="other"))
    with pytest.raises(BundleError, match=r"manifest.json is (longer|shorter) than|manifest.json is damaged"):
        copy_bundle(bundle, tmp_path / "new")
    assert os.listdir(tmp_path) == ["copy"]


def test_a_bundle_is_replaced_only_on_request(tiny_bundle, copy, tmp_path):
    wanted = arguments(Bundle.open(tiny_bundle)) | {"name": "second"}
    with pytest.raises(BundleError, match="exists already"):
        write_bundle(copy, **wanted)
    assert Bundle.open(copy).manifest.name == "tiny"
    (copy / "left-over.txt").write_text("of the first")
    assert write_bundle(copy, **wanted, overwrite=True).manifest.name == "second"
    assert sorted(path.name for path in copy.iterdir()) == sorted([*FILES, "manifest.json"])
    assert os.listdir(tmp_path) == ["copy"]


def test_only_bundles_are_overwritten(tiny_bundle, tmp_path):
    wanted = arguments(Bundle.open(tiny_bundle))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear to somebody")
    (tmp_path / "file").write_text("a file")
    for name in ("home", "file"):
        with pytest.raises(BundleError, match="is not a bundle, and only a bundle is overwritten"):
            write_bundle(tmp_path / name, **wanted, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear to somebody"
    (tmp_path / "empty").mkdir()
    assert write_bundle(tmp_path / "empty", **wanted, overwrite=True).manifest.name == "tiny"


def test_nothing_half_written_stays(tiny_bundle, copy, tmp_path, monkeypatch):
    wanted = arguments(Bundle.open(tiny_bundle))
    contradiction = wanted | {"grid": GridSpec(3, 3, 5)}
    with pytest.raises(BundleError, match="contradicts image and grid"):
        write_bundle(tmp_path / "new", **contradiction)
    with pytest.raises(BundleError, match=r"files does not list extractor\.onnx"):
        write_bundle(tmp_path / "new", **wanted | {"contents": {"vocabulary.json": b"", "selftest.json": b""}})
    with pytest.raises(BundleError, match=r"vocabulary\.json"):
        write_bundle(tmp_path / "new", **wanted | {"contents": wanted["contents"] | {"vocabulary.json": b"{}"}})
    for scores in ({"CIDEr": float("nan")}, {"CIDEr": object()}):
        with pytest.raises(BundleError, match="new: its facts are not JSON values: "):
            write_bundle(tmp_path / "new", **wanted | {"scores": scores})
    assert os.listdir(tmp_path) == ["copy"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    # Even a failure in the very last step leaves the bundle that was there.
    monkeypatch.setattr(caption_rt.bundle, "_move", fail)
    with pytest.raises(CaptionError, match=r"cannot be written: .*No space left on device"):
        write_bundle(copy, **wanted, overwrite=True)
    assert os.listdir(tmp_path) == ["copy"]
    assert Bundle.open(copy).manifest.name == "tiny"


def test_the_old_bundle_comes_back_when_the_new_cannot_take_its_place(copy, tmp_path):
    with pytest.raises(OSError, match="gone"):
        caption_rt.bundle._move(tmp_path / "gone", copy)
    assert Bundle.open(copy).manifest.name == "tiny"
    assert os.listdir(tmp_path) == ["copy"]


def test_the_default_bundle_is_found_in_the_package_or_the_checkout(tiny_bundle, tmp_path, monkeypatch):
    package = tmp_path / "runtime" / "caption_rt"
    package.mkdir(parents=True)
    monkeypatch.setattr(caption_rt.bundle, "__file__", str(package / "bundle.py"))
    with pytest.raises(BundleError, match="no bundle came with this installation: name one"):
        default_bundle_path()
    shutil.copytree(tiny_bundle, tmp_path / "models" / "default")
    assert default_bundle_path() == tmp_path / "models" / "default"
    shutil.copytree(tiny_bundle, package / "models" / "default")
    assert default_bundle_path() == package / "models" / "default"


def test_a_size_is_a_size():
    assert FileSpec("a" * 64, 3).to_json() == {"sha256": "a" * 64, "size": 3}
