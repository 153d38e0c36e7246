"""Bundles that were made to do harm: each is refused with one sentence, and ONNX Runtime never sees it.

Each is opened as a program and as the command line open one, with a spy where ONNX Runtime would be given a graph.
"""

import io
import os
import shutil
import struct
import time
import tracemalloc
import zipfile
import zlib

import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from bundles import edit_manifest, replace_file
from caption_rt import Captioner
from caption_rt.bundle import Bundle
from caption_rt.cli import main
from caption_rt.errors import BundleError

LINK = 0o120777 << 16


@pytest.fixture
def sessions(monkeypatch):
    """The sessions that are made."""
    made, real = [], onnxruntime.InferenceSession

    def make(*arguments, **options):
        made.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    return made


@pytest.fixture
def refused(sessions, photos, capfd):
    """Open a bundle in both ways; gives the sentence that both refuse it with."""

    def check(path):
        with pytest.raises(BundleError) as caught:
            Captioner.load(path, "cpu")
        sentence = str(caught.value)
        assert sentence.isprintable()
        assert main(["--model", str(path), "--device", "cpu", str(photos[0])]) == 3
        printed = capfd.readouterr()
        assert (printed.out, printed.err) == ("", f"caption-rt: error: {sentence}\n")
        assert sessions == []
        return sentence

    return check


def edit_graph(folder, name, change):
    model = onnx.load(folder / name)
    change(model)
    replace_file(folder, name, model.SerializeToString())


def zipped(folder, *, replaced=None, method=zipfile.ZIP_DEFLATED, more=()):
    """The folder as a zip file; `replaced` and `more` are entries by their ZipInfo or name, with their bytes."""
    path = folder.with_suffix(".zip")
    entries = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in [*(entries | (replaced or {})).items(), *more]:
            archive.writestr(name, data)
    return path


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


def entry(name, **fields):
    made = zipfile.ZipInfo(name)
    made.compress_type = zipfile.ZIP_DEFLATED
    for field, value in fields.items():
        setattr(made, field, value)
    return made


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../manifest.json", "an entry '../manifest.json', whose name leads out of its folder"),
        ("a/../../b", "whose name leads out of its folder"),
        ("/etc/passwd", "an entry '/etc/passwd', whose name leads out of its folder"),
        ("..\\b", "whose name leads out of its folder"),
        ("a\\b", "whose name leads out of its folder"),
        ("C:b", "whose name leads out of its folder"),
    ],
)
def test_an_entry_that_leads_out_is_refused(copy, refused, name, sentence):
    """Even one that the manifest does not list: who unpacks the file with something else is led out by it."""
    assert sentence in refused(zipped(copy, more=[(name, b"evil")]))


def test_a_name_that_ends_early_is_refused(copy, refused):
    path = zipped(copy, more=[("README.md.exe", b"evil")])
    path.write_bytes(path.read_bytes().replace(b"README.md.exe", b"README.md\0exe"))
    assert "whose name leads out of its folder" in refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", ["encoder.onnx", "manifest.json", "unlisted"])
def test_an_entry_that_is_there_twice_is_refused(copy, refused, name):
    assert f"has the entry {name} twice" in refused(zipped(copy, more=[(name, b"evil"), (name, b"evil")]))


@pytest.mark.parametrize("mode", [0o120777, 0o010644, 0o040755, 0o020666])
def test_a_link_in_a_zip_file_is_refused(copy, refused, mode):
    data = (copy / "decoder.onnx").read_bytes()
    (copy / "decoder.onnx").unlink()
    path = zipped(copy, more=[(entry("decoder.onnx", external_attr=mode << 16), data)])
    assert "decoder.onnx is not a regular file, and links are not followed" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_cannot_be_stopped_is_refused(copy, refused, method):
    assert f"is compressed by zip's method {method}, and only stored or deflated" in refused(
        zipped(copy, method=method)
    )


def directory(data):
    """Where a zip file's directory begins, how long it is, and where the record about it begins; all of 32 bits."""
    end = data.rfind(b"PK\5\6")
    size, start = struct.unpack("<LL", data[end + 12 : end + 20])
    return start, size, end


def edit_entries(path, name, **fields):
    """Change fields in the directory's entry of a file: offset and format by their names here."""
    places = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<L"), "packed": (20, "<L"), "size": (24, "<L")}
    data = bytearray(path.read_bytes())
    here, size, _ = directory(data)
    end = here + size
    while here < end:
        lengths = struct.unpack("<HHH", data[here + 28 : here + 34])
        if data[here + 46 : here + 46 + lengths[0]].decode() == name:
            for field, value in fields.items():
                offset, form = places[field]
                struct.pack_into(form, data, here + offset, value)
        here += 46 + sum(lengths)
    path.write_bytes(data)
    return path


def test_an_encrypted_entry_is_refused(copy, refused):
    assert "encoder.onnx is encrypted, and a bundle is not" in refused(
        edit_entries(zipped(copy), "encoder.onnx", flags=1)
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"size": 100}, "cannot be read"),
        ({"packed": 100}, "cannot be read"),
        ({"packed": 2**31}, "has entries that are larger than itself, or lie on top of each other"),
        ({"crc": 1}, "cannot be read"),
        ({"method": 99}, "is compressed by zip's method 99"),
    ],
)
def test_claims_that_are_not_true_are_refused(copy, refused, fields, sentence):
    assert sentence in refused(edit_entries(zipped(copy), "encoder.onnx", **fields))


def test_a_claim_that_is_too_large_is_not_what_counts(copy):
    path = edit_entries(zipped(copy), "encoder.onnx", size=2**31)
    assert Bundle.open(path).read("encoder.onnx") == (copy / "encoder.onnx").read_bytes()


@pytest.fixture
def modest():
    """Fails where what was tried took much memory or time."""
    tracemalloc.start()
    start = time.monotonic()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert time.monotonic() - start < 30


ZEROS = 200 * 10**6


def zeros_deflated():
    """A deflated stream of 200 MB of zeros, without zlib's frame."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join([packer.compress(bytes(10**6)) for _ in range(ZEROS // 10**6)] + [packer.flush()])


@pytest.mark.parametrize("truthful", [False, True])
@pytest.mark.parametrize("name", ["README.md", "encoder.onnx", "manifest.json", "vocabulary.json"])
def test_a_zip_bomb_is_refused(copy, refused, modest, name, truthful):
    """Of zeros, whether the manifest says so or not."""
    if truthful and name != "manifest.json":
        state = {"sha256": "0" * 64, "size": min(ZEROS, 2**26) if not name.endswith(".onnx") else ZEROS}
        edit_manifest(copy, lambda data: data["files"].update({name: state}))
    (copy / name).unlink() if name != "manifest.json" else None
    path = copy.with_suffix(".zip")
    stream = zeros_deflated()
    with zipfile.ZipFile(path, "w") as archive:
        for file in copy.iterdir():
            if file.name != name:
                archive.write(file, file.name)
        archive.writestr(entry(name, compress_type=zipfile.ZIP_STORED), stream)
    # What was stored is said to be deflated, in the directory and at the entry itself.
    edit_entries(path, name, method=8, size=ZEROS)
    data = bytearray(path.read_bytes())
    local = data.find(b"PK\3\4", max(data.find(stream) - 30 - len(name), 0))
    struct.pack_into("<H", data, local + 8, 8)
    struct.pack_into("<L", data, local + 22, ZEROS)
    path.write_bytes(data)
    sentence = refused(path)
    if name == "manifest.json":
        assert "manifest.json is above 4194304 bytes" in sentence
    elif truthful:
        assert f"{name} would become" in sentence
        assert "this is a zip bomb" in sentence
    else:
        assert f"{name} is longer than the" in sentence


def test_a_bomb_within_is_never_opened(copy, modest, sessions):
    """A zip file in the zip file is not listed by the manifest, and what is not listed is not read."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10**7))
    edit_manifest(copy, lambda data: data.update(description="with a bomb in it"))
    Captioner.load(zipped(copy, more=[("bomb.zip", inner.getvalue())]), "cpu")
    assert len(sessions) == 3


def test_entries_on_top_of_each_other_are_refused(copy, refused, modest):
    """As in Fifield's bomb (https://www.bamsoftware.com/hacks/zipbomb/): every entry is the same bytes."""
    path = zipped(copy, more=[("bomb", os.urandom(10**5))])
    data = path.read_bytes()
    start, size, end = directory(data)
    last = data.rfind(b"PK\1\2", start, end)
    more = b"".join(data[last:end].replace(b"bomb", b"b%03d" % number) for number in range(999))
    record = bytearray(data[end:])
    struct.pack_into("<HHL", record, 8, 65535, 65535, size + len(more))
    path.write_bytes(data[:end] + more + record)
    assert len(zipfile.ZipFile(path).infolist()) > 1000
    assert "larger than itself, or lie on top of each other" in refused(path)


@pytest.mark.parametrize("size", [None, 2**32 - 2])
def test_a_million_entries_are_refused_unread(copy, refused, modest, size):
    """Also a directory that claims to be larger than the file."""
    path = zipped(copy, more=[("x", b"")])
    data = path.read_bytes()
    start, _, end = directory(data)
    last = data.rfind(b"PK\1\2", start, end)
    count = 1_000_000 if size is None else 1
    more = data[last:end] * count
    record = bytearray(data[end:])
    struct.pack_into("<HHL", record, 8, 65535, 65535, size or end - start + len(more))
    path.write_bytes(data[:end])
    with path.open("ab") as file:
        file.write(more)
        file.write(record)
    sentence = refused(path)
    if size is None:
        assert f"the directory of the zip file {path} is above 1048576 bytes" in sentence
    else:
        assert "neither a folder nor a whole zip file" in sentence


def test_a_bundle_in_two_folders_down_is_none(copy, refused):
    files = {file.name: file.read_bytes() for file in copy.iterdir()}
    path = copy.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"a/b/{name}", data)
    assert "holds 0 files manifest.json" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        for folder in ("a/", "b/"):
            for name, data in files.items():
                archive.writestr(folder + name, data)
    assert "holds 2 files manifest.json" in refused(path)
