"""Bundles that were made to do harm: each is refused with one sentence, and ONNX Runtime never sees it.

Each is opened as a program and as the command line open one, with a spy where ONNX Runtime would be given a graph.
"""

import os
import shutil

import onnx
import pytest
from onnx import TensorProto

from bundles import edit_manifest, replace_file, zipped
from caption_rt import Captioner


def edit_graph(folder, name, change):
    model = onnx.load(folder / name)
    change(model)
    replace_file(folder, name, model.SerializeToString())


def test_a_good_bundle_reaches_onnx_runtime(copy, sessions):
    """The spy sees what there is to see."""
    # Of a bundle like that of other tests the sessions may be there already.
    edit_manifest(copy, lambda data: data.update(description="one of this test's own"))
    assert Captioner.load(copy, "cpu").provider == "CPUExecutionProvider"
    assert len(sessions) == 3
    del sessions[:]
    edit_manifest(copy, lambda data: data.update(description="another, whose sessions are not there yet"))
    Captioner.load(zipped(copy), "cpu")
    assert len(sessions) == 3


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def as_link(path, outside):
    shutil.move(path, outside)
    path.symlink_to(outside)


def name_outside(name):
    def change(folder):
        (folder.parent / "outside.onnx").write_bytes((folder / "decoder.onnx").read_bytes())

        def edit(data):
            data["precisions"]["fp32"]["decoder"]["file"] = name
            data["files"][name] = data["files"].pop("decoder.onnx")

        edit_manifest(folder, edit)

    return change


def listed(**files):
    def change(folder):
        edit_manifest(folder, lambda data: data["files"].update(files))

    return change


def a_copy_named(name):
    def change(folder):
        data = (folder / "README.md").read_bytes()
        replace_file(folder, name, data)

    return change


def sparse(name, size):
    def change(folder):
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return change


def external(location, **more):
    """The data of the encoder's first weights are elsewhere."""

    def edit(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            tensor.external_data.add(key=key, value=str(value))

    return lambda folder: edit_graph(folder, "encoder.onnx", edit)


def other_shape(model):
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7


def other_dtype(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def one_more_input(model):
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[-1].name = "key"


SIZE_2G = {"sha256": "0" * 64, "size": 2**31}
FOLDERS = {
    "a changed byte of a graph": (lambda f: flip(f / "encoder.onnx"), "encoder.onnx is damaged or was changed"),
    "a changed byte of the words": (lambda f: flip(f / "vocabulary.json"), "vocabulary.json is damaged or was changed"),
    "a changed byte of the card": (lambda f: flip(f / "README.md"), "README.md is damaged or was changed"),
    "a missing graph": (lambda f: (f / "decoder.onnx").unlink(), "decoder.onnx is missing"),
    "a missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "a name that climbs out": (name_outside("../outside.onnx"), "is not the name of a file inside the bundle"),
    "a name in a folder": (name_outside("sub/decoder.onnx"), "is not the name of a file inside the bundle"),
    "an absolute name": (name_outside("/etc/passwd"), "is not the name of a file inside the bundle"),
    "a name with a backslash": (name_outside("..\\outside.onnx"), "is not the name of a file inside the bundle"),
    "a device of Windows": (a_copy_named("NUL.md"), "'NUL.md' is not the name of a file inside the bundle"),
    "a name that ends with a dot": (a_copy_named("README."), "'README.' is not the name of a file inside the bundle"),
    "names that differ in capitals": (
        a_copy_named("readme.md"),
        "files README.md and readme.md differ in capitals alone",
    ),
    "a manifest within": (a_copy_named("Manifest.json"), "'Manifest.json' is not the name of a file inside"),
    "a link to a file": (
        lambda f: as_link(f / "decoder.onnx", f.parent / "outside.onnx"),
        "decoder.onnx is not a regular file, and links are not followed",
    ),
    "a link to the manifest": (
        lambda f: as_link(f / "manifest.json", f.parent / "manifest.json"),
        "manifest.json is not a regular file, and links are not followed",
    ),
    "a link to a folder": (
        lambda f: ((f / "README.md").unlink(), (f / "README.md").symlink_to(f.parent)),
        "README.md is not a regular file, and links are not followed",
    ),
    "a folder instead of a file": (
        lambda f: ((f / "README.md").unlink(), (f / "README.md").mkdir()),
        "README.md is not a regular file",
    ),
    "a graph of an absurd size": (sparse("decoder.onnx", 2**40), "decoder.onnx is longer than the 3955 bytes"),
    "a manifest of an absurd size": (sparse("manifest.json", 2**40), "manifest.json is above 4194304 bytes"),
    "a stated size that is absurd": (listed(x={"sha256": "0" * 64, "size": 10**18}), "size is above 2147483648 bytes"),
    "a text of an absurd size": (
        listed(x={"sha256": "0" * 64, "size": 10**8}),
        "x: size is above 67108864 bytes, and it",
    ),
    "too many files": (
        listed(**{f"f{i}": {"sha256": "0" * 64, "size": 1} for i in range(100)}),
        "files lists 106, and a bundle has 100 at most",
    ),
    "too much together": (
        listed(**{f"{i}.onnx": {"sha256": "0" * 64, "size": 2**31} for i in range(3)}),
        "together, and those of a bundle 4294967296 at most",
    ),
    "weights in a file outside": (external("../../secret"), "encoder.onnx keeps the data of fc outside of the file"),
    "weights in an absolute file": (external("/etc/passwd"), "encoder.onnx keeps the data of fc outside of the file"),
    "weights in a file beside it": (external("README.md"), "encoder.onnx keeps the data of fc outside of the file"),
    "weights at an address in memory": (
        external("*/_ORT_MEM_ADDR_/*", offset=140000000000000, length=120),
        "encoder.onnx keeps the data of fc outside of the file",
    ),
    "another shape": (
        lambda f: edit_graph(f, "decoder.onnx", other_shape),
        "decoder.onnx: the output log_probs is float32 ['any', 7], and its manifest states float32 ['m', 16]",
    ),
    "another dtype": (
        lambda f: edit_graph(f, "extractor.onnx", other_dtype),
        "extractor.onnx: the input images is of ONNX's type 11 ['any', 32, 32, 3], and its manifest states uint8",
    ),
    "an input more": (
        lambda f: edit_graph(f, "encoder.onnx", one_more_input),
        "encoder.onnx has the inputs grid, key, not those of its manifest",
    ),
    "no ONNX file": (
        lambda f: replace_file(f, "encoder.onnx", b"<html>404 not found</html>"),
        "encoder.onnx is not an ONNX file",
    ),
    "ONNX Runtime's own format": (
        lambda f: replace_file(f, "encoder.onnx", b"\x1c\x00\x00\x00ORTM" + bytes(99)),
        "encoder.onnx is not an ONNX file: it is in ONNX Runtime's own format",
    ),
    "a newer format": (
        lambda f: edit_manifest(f, lambda data: data.update(format_version=99)),
        "the bundle has format 99 and this caption-rt reads 1: pip install -U caption-rt",
    ),
    "a key twice": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("{", '{"name": "x",', 1)),
        "the key 'name' is there twice",
    ),
    "brackets without end": (
        lambda f: (f / "manifest.json").write_text("[" * 10**6),
        "manifest.json is not valid JSON",
    ),
    "a number without end": (
        lambda f: (f / "manifest.json").write_text('{"format_version": ' + "9" * 10**6 + "}"),
        "manifest.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("attack", FOLDERS)
def test_a_hostile_folder_is_refused(copy, refused, attack):
    make, sentence = FOLDERS[attack]
    make(copy)
    assert sentence in refused(copy)


@pytest.mark.parametrize(
    "attack",
    [
        name
        for name in FOLDERS
        # Those are made another way in zip files, and a terabyte is a zip bomb there.
        if not any(
            kind in name for kind in ("link", "folder instead", "a graph of an absurd", "a manifest of an absurd")
        )
    ],
)
def test_the_same_in_a_zip_file_is_refused(copy, refused, attack):
    make, sentence = FOLDERS[attack]
    make(copy)
    expected = "holds 0 files manifest.json" if attack == "a missing manifest" else sentence
    assert expected in refused(zipped(copy))


def test_a_pipe_is_refused_and_not_waited_for(copy, refused):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes with names")
    (copy / "README.md").unlink()
    os.mkfifo(copy / "README.md")
    assert "README.md is not a regular file" in refused(copy)


def test_a_link_to_the_whole_bundle_is_the_users_own(copy, tmp_path):
    """Whoever names the link means what it leads to; what is in a bundle was named by somebody else."""
    (tmp_path / "current").symlink_to(copy, target_is_directory=True)
    assert Captioner.load(tmp_path / "current", "cpu").bundle.manifest.name == "tiny"
    archive = zipped(copy)
    (tmp_path / "current.zip").symlink_to(archive)
    assert Captioner.load(tmp_path / "current.zip", "cpu").bundle.manifest.name == "tiny"
