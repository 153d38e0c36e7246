"""The tools around bundles, which need no TensorFlow: inspect, verify, pack, unpack."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile

import onnx
import pytest
from onnx import TensorProto, helper

from bundles import change_file, replace_file
from caption_export import packing, verifying
from caption_rt.bundle import Bundle
from caption_rt.captioner import Captioner

GRAPHS = ("extractor", "encoder", "decoder")


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def add_file(folder, name, data):
    """Put a file into the bundle that its manifest lists."""
    (folder / name).write_bytes(b"{}")
    change_file(folder, "manifest.json", lambda manifest: manifest["files"].update({name: {}}))
    change_file(folder, name, lambda record: record.update(data))


def too_large_for_a_float(folder):
    """What Python writes as infinite becomes a number that is JSON, in a bundle's verification.json."""
    replace_file(
        folder, "verification.json", (folder / "verification.json").read_bytes().replace(b"Infinity", b"1e400")
    )


def add_int8(folder):
    """A second precision, of the same files."""

    def twice(manifest):
        manifest["precisions"]["int8"] = manifest["precisions"]["fp32"]

    change_file(folder, "manifest.json", twice)
    change_file(folder, "selftest.json", lambda record: record["tolerance"].update(int8_word_log_prob=0.5))


def edit_graph(folder, name, change):
    """Change a graph, and its manifest with it."""
    model = onnx.load(folder / name)
    change(model)
    data = model.SerializeToString()
    (folder / name).write_bytes(data)
    state = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    change_file(folder, "manifest.json", lambda manifest: manifest["files"].update({name: state}))


def without(tmp_path, *packages):
    """An environment in which packages are not installed."""
    for package in packages:
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}


def command(*arguments, env):
    code = "import sys; from caption_export.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


TENSORFLOW = ("tensorflow", "keras", "tf2onnx")


def test_all_of_them_work_without_tensorflow(tiny_bundle, photos, tmp_path):
    env = without(tmp_path, *TENSORFLOW)
    for arguments in (
        ("inspect", tiny_bundle),
        ("verify", tiny_bundle, "--photos", photos[0].parent),
        ("pack", tiny_bundle, tmp_path / "tiny.zip"),
        ("unpack", tmp_path / "tiny.zip", tmp_path / "tiny"),
    ):
        done = command(*arguments, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_without_onnx_the_nodes_are_not_counted_and_nothing_is_verified(tiny_bundle, tmp_path):
    env = without(tmp_path, *TENSORFLOW, "onnx")
    done = command("inspect", tiny_bundle, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fp32       encoder    encoder.onnx    897 bytes  -      - (with the package onnx)" in done.stdout
    record = json.loads(command("inspect", tiny_bundle, "--json", env=env).stdout)
    assert record["precisions"]["fp32"]["encoder"]["nodes"] is None
    done = command("verify", tiny_bundle, env=env)
    sentence = "onnx is not installed: pip install 'caption-rt[export]' brings it"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"caption-export: error: {sentence}\n")


def test_inspect_tells_a_program_everything(call, tiny_bundle):
    result = call("inspect", tiny_bundle, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    bundle = Bundle.open(tiny_bundle)
    assert (facts["sha256"], facts["name"], facts["words"]) == (bundle.sha256, "tiny", 16)
    assert facts["size"] == sum(path.stat().st_size for path in tiny_bundle.iterdir())
    assert facts["files"] == {name: spec.to_json() for name, spec in bundle.manifest.files.items()}
    assert facts["precisions"]["fp32"]["encoder"] == {
        "file": "encoder.onnx",
        **bundle.manifest.files["encoder.onnx"].to_json(),
        "inputs": {"grid": "float32 [n, 6, 5]"},
        "outputs": {
            "features": "float32 [n, 6, 6]",
            "keys": "float32 [n, 6, 4]",
            "initial_state": "float32 [n, 7]",
        },
        "opset": {"ai.onnx": 18},
        "nodes": 7,
        "operators": {"Add": 1, "MatMul": 3, "ReduceMean": 1, "Relu": 1, "Tanh": 1},
    }


def test_inspect_shows_a_person_a_table(call, copy, tmp_path):
    change_file(copy, "manifest.json", lambda m: m.update(scores={"test": {"CIDEr": 0.51234, "beam": {"size": 3}}}))
    add_int8(copy)
    for path in (copy, packing.pack_bundle(Bundle.open(copy), tmp_path / "tiny.zip")):
        lines = call("inspect", path).stdout.splitlines()
        assert lines[0] == "tiny: A captioner of a few kB with random weights, for tests."
        size = sum(file.stat().st_size for file in copy.iterdir())
        assert f"bundle     {path}, format 1, {size / 1024:.1f} KiB" in lines
        assert (
            "fp32       encoder    encoder.onnx    897 bytes  7      3 MatMul, 1 Add, 1 ReduceMean, 1 Relu, 1 Tanh"
            in lines
        )
        assert [line.split()[:2] for line in lines if line.startswith("int8")] == [["int8", name] for name in GRAPHS]
        at = lines.index("scores of the run, in TensorFlow")
        assert [line.split() for line in lines[at + 1 : at + 4]] == [
            ["test", "CIDEr", "0.51234"],
            ["test", "beam", "size", "3"],
            [],
        ]
        sha256 = Bundle.open(copy).manifest.files["README.md"].sha256
        assert f"README.md        98     {sha256}" in lines


def scored(precision):
    """What an export found of captions in a reduced precision, by its two searches."""
    return [
        {
            "search": search,
            "captions": 9,
            "equal": equal,
            "scores": {"fp32": {"CIDEr": 0.5}, precision: {"CIDEr": cider}},
        }
        for search, equal, cider in (("greedy search", 0.8, 0.49), ("a beam of 3", 0.75, 0.51))
    ]


def test_inspect_shows_scores_by_precision(call, copy):
    add_int8(copy)
    add_file(copy, "verification.json", {"fp32": {"captions": []}, "int8": {"captions": scored("int8")}})
    assert json.loads(call("inspect", copy, "--json").stdout)["measured"] == {
        "fp32": {"greedy search": {"CIDEr": 0.5}, "a beam of 3": {"CIDEr": 0.5}},
        "int8": {
            "greedy search": {"CIDEr": 0.49, "equal captions": 0.8},
            "a beam of 3": {"CIDEr": 0.51, "equal captions": 0.75},
        },
    }
    lines = call("inspect", copy).stdout.splitlines()
    at = lines.index("scores by precision, in ONNX Runtime")
    assert lines[at - 3 : at] == ["scores of the run, in TensorFlow", "none are stated", ""]
    assert lines[at + 5].split() == ["int8", "a", "beam", "of", "3", "CIDEr", "0.51"]
    # Of a bundle without fp32, nothing is said of fp32.
    change_file(copy, "manifest.json", lambda manifest: manifest["precisions"].pop("fp32"))
    assert list(json.loads(call("inspect", copy, "--json").stdout)["measured"]) == ["int8"]
    for change in (
        lambda record: record["int8"]["captions"][1].update(equal=math.inf),
        lambda record: record["int8"].update(captions={}),
    ):
        change_file(copy, "verification.json", change)
        too_large_for_a_float(copy)
        result = call("inspect", copy)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "verification.json: int8: captions" in result.stderr


def test_inspect_gives_no_program_what_is_no_json(call, copy):
    change_file(copy, "manifest.json", lambda manifest: manifest.update(scores={"test": {"CIDEr": math.inf}}))
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace("Infinity", "1e400"))
    result = call("inspect", copy, "--json")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "manifest.json has a number that no float can hold: export the model again" in result.stderr


def test_verify_says_what_it_examined(call, copy, photos):
    add_int8(copy)
    result = call("verify", copy, "--photos", photos[0].parent, "--limit-photos", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line[4:23].strip() for line in lines[:-2]] == [
        "files",
        *(f"{precision} {graph}" for precision in ("fp32", "int8") for graph in GRAPHS),
        "verification.json",
        *("fp32 self-test", "fp32 photos", "int8 self-test", "int8 photos"),
    ]
    assert {line[:2] for line in lines[:-2] if "verification" not in line} == {"ok"}
    assert "-   verification.json  not there: the bundle does not say what its export found" in lines
    assert "ok  fp32 photos        2 captioned, the same words 1, 2, 7 at a time" in lines
    assert "ok  int8 photos        2 captioned, 2 with the same words as in fp32" in lines
    assert lines[-1] == f"{copy} is what it says"


def stated(folder, **changed):
    """What an export found, of a bundle's own graphs."""
    counted = {}
    for name in GRAPHS:
        model = onnx.load(folder / f"{name}.onnx")
        kinds = sorted({node.op_type for node in model.graph.node})
        operators = {kind: sum(node.op_type == kind for node in model.graph.node) for kind in kinds}
        size = (folder / f"{name}.onnx").stat().st_size
        counted[name] = {"bytes": size, "opset": 18, "nodes": len(model.graph.node), "operators": operators}
    return {"photos": 12, "fp32": {"graphs": counted}} | changed


def test_what_the_export_found_is_held_against_the_graphs(call, copy):
    add_file(copy, "verification.json", stated(copy))
    result = call("verify", copy)
    assert result.exit_code == 0
    assert (
        "ok  verification.json  about these graphs, which its export compared with TensorFlow on 12 images"
        in result.stdout
    )
    change_file(
        copy, "verification.json", lambda record: record["fp32"]["graphs"]["encoder"]["operators"].update(Relu=9)
    )
    result = call("verify", copy)
    assert result.exit_code == 8
    assert "verification.json is about another encoder graph in fp32 than the one in the bundle" in result.stderr
    for broken in ({"photos": None}, {"photos": math.inf}, {"fp32": []}, {"fp32": {"graphs": {"encoder": 3}}}):
        change_file(copy, "verification.json", lambda record, broken=broken: record.update(stated(copy, **broken)))
        too_large_for_a_float(copy)
        result = call("verify", copy)
        assert result.exit_code == 8
        assert "verification.json does not say what an export found" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def custom(model):
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def invalid(model):
    model.graph.node[0].input[0] = "nowhere"


def training(model):
    model.graph.node.insert(0, helper.make_node("Dropout", ["fc"], ["dropped"], name="drop"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (custom, "the encoder graph uses the operator sets {'': 18, 'com.example': 1}"),
        (invalid, "the encoder graph is not valid ONNX"),
        (training, "the encoder graph: node drop (Dropout) is left over from training"),
        (
            lambda model: model.opset_import[0].__setattr__("version", 17),
            "the encoder graph uses the operator sets {'': 17}",
        ),
    ],
)
def test_a_graph_that_is_not_what_an_export_writes_is_refused(call, copy, change, sentence):
    edit_graph(copy, "encoder.onnx", change)
    result = call("verify", copy)
    assert result.exit_code == 8
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "fp32 extractor" in result.stdout  # which was passed


def test_hostile_and_damaged_bundles_are_refused(call, copy, tmp_path):
    def external(model):
        model.graph.initializer[0].data_location = TensorProto.EXTERNAL

    edit_graph(copy, "encoder.onnx", external)
    for arguments in (("inspect", copy), ("verify", copy), ("pack", copy, tmp_path / "out.zip")):
        result = call(*arguments)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "encoder.onnx keeps the data of fc outside of the file" in result.stderr
    assert os.listdir(tmp_path) == ["copy"]


def test_other_words_fail_the_self_test(call, copy):
    change_file(copy, "selftest.json", lambda record: record["expected"][1].update(log_prob=-1.0))
    result = call("verify", copy)
    assert result.exit_code == 5
    assert "the self-test failed" in result.stderr


def test_words_that_depend_on_the_batch_are_found(call, tiny_bundle, photos, monkeypatch):
    real = Captioner.caption_pixels

    def mixed(self, images, *arguments, **options):
        return real(self, images[:1] * len(images), *arguments, **options)

    monkeypatch.setattr(Captioner, "caption_pixels", mixed)
    result = call("verify", tiny_bundle, "--photos", photos[0].parent)
    assert result.exit_code == 8
    assert "chelsea.jpg gets" in result.stderr
    assert "with 2 photos at once" in result.stderr


def test_verify_needs_photos_that_can_be_read(call, tiny_bundle, tmp_path, caplog):
    result = call("verify", tiny_bundle, "--limit-photos", 3)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--limit-photos is about --photos: name a folder of them, or leave it out" in result.stderr
    result = call("verify", tiny_bundle, "--photos", tmp_path)
    assert (result.exit_code, result.stdout) == (6, "")
    (tmp_path / "no.jpg").write_bytes(b"no photo")
    result = call("verify", tiny_bundle, "--photos", tmp_path)
    assert result.exit_code == 8
    assert "no photo can be read: name a folder of real photos" in result.stderr
    assert verifying.BATCH_SIZES == (1, 2, 7)


def test_packing_gives_the_same_bytes_whenever_and_from_wherever(call, copy, tmp_path):
    first = packing.pack_bundle(Bundle.open(copy), tmp_path / "a" / "first.zip").read_bytes()
    (copy / "left-over.txt").write_text("not listed")
    for number, path in enumerate(sorted(copy.iterdir())):
        path.chmod(0o600)
        os.utime(path, (time.time(), 10**9 + number * 10**6))
    assert call("pack", copy, tmp_path / "second.zip").stdout == f"{tmp_path / 'second.zip'}: 28.5 KiB\n"
    assert (tmp_path / "second.zip").read_bytes() == first
    # A zip file of another program, with its folder in it and deflated.
    other = shutil.make_archive(tmp_path / "other", "zip", tmp_path, "copy")
    assert call("pack", other, tmp_path / "third.zip").exit_code == 0
    assert (tmp_path / "third.zip").read_bytes() == first
    with zipfile.ZipFile(tmp_path / "second.zip") as archive:
        assert archive.namelist() == ["manifest.json", *sorted(Bundle.open(copy).manifest.files)]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o100644}
        assert archive.testzip() is None
    assert sorted(os.listdir(tmp_path)) == ["a", "copy", "other.zip", "second.zip", "third.zip"]


def test_unpacking_gives_the_bundle_back(call, tiny_bundle, tmp_path):
    assert call("pack", tiny_bundle, tmp_path / "tiny.zip").exit_code == 0
    result = call("unpack", tmp_path / "tiny.zip", tmp_path / "tiny")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'tiny'}: 7 files\n")
    assert {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()} == {
        path.name: path.read_bytes() for path in tiny_bundle.iterdir()
    }


def test_nothing_is_overwritten_unasked(call, copy, tmp_path):
    archive = tmp_path / "tiny.zip"
    assert call("pack", copy, archive).exit_code == 0
    before = archive.read_bytes()
    change_file(copy, "manifest.json", lambda manifest: manifest.update(description="another"))
    for arguments, what in ((("pack", copy, archive), "file"), (("unpack", archive, copy), "folder")):
        result = call(*arguments)
        assert (result.exit_code, result.stdout) == (3, "")
        sentence = f"exists already: name another {what}, or replace it with --overwrite"
        assert result.stderr == f"caption-export: error: {arguments[2]} {sentence}\n"
    assert archive.read_bytes() == before
    assert call("pack", copy, archive, "--overwrite").exit_code == 0
    assert Bundle.open(archive).manifest.description == "another"
    assert call("unpack", archive, copy, "--overwrite").exit_code == 0


def test_what_is_no_zip_file_is_never_replaced(call, copy, photos, tmp_path):
    photo = shutil.copy(photos[0], tmp_path / "photo.jpg")
    (tmp_path / "link.zip").symlink_to(tmp_path / "elsewhere.zip")
    for target in (photo, tmp_path / "link.zip", copy):
        result = call("pack", copy, target, "--overwrite")
        assert result.exit_code == 3
        assert "is no zip file, and only a zip file is overwritten" in result.stderr
    result = call("unpack", copy, tmp_path / "photo.jpg", "--overwrite")
    assert result.exit_code == 3
    assert "is not a bundle, and only a bundle is overwritten" in result.stderr
    assert (tmp_path / "photo.jpg").read_bytes() == photos[0].read_bytes()


def test_a_place_that_cannot_be_written_is_named_and_no_temporary_file(call, copy, tmp_path):
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / "file" / "tiny"
    for name, start, why in (
        ("pack", "the zip file ", f"{place.parent} is not a folder"),
        ("unpack", "the bundle ", "Not a directory"),
        ("graph", "", f"{place.parent} is not a folder"),
    ):
        result = call(name, copy, place)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"caption-export: error: {start}{place} cannot be written: {why}\n"


def test_a_zip_file_is_there_wholly_or_not_at_all(call, copy, tmp_path, monkeypatch):
    archive = packing.pack_bundle(Bundle.open(copy), tmp_path / "tiny.zip")
    before = archive.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.os, "replace", full)
    result = call("pack", copy, archive, "--overwrite")
    assert result.exit_code == 1
    assert "tiny.zip cannot be written: No space left on device: make room on the disk" in result.stderr
    assert archive.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["copy", "tiny.zip"]
