"""Zip files that were made to do harm: names that lead out, links, bombs, entries and directories that lie.

What is wrong with a bundle whether zipped or not is in test_hostile_bundles.py.
"""

import io
import os
import struct
import time
import tracemalloc
import zipfile
import zlib

import pytest

from bundles import edit_manifest, zipped
from caption_rt import Captioner
from caption_rt.bundle import Bundle


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
