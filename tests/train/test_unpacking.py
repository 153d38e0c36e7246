"""What an archive of unknown origin may hold, and what is said of it."""

import random
import stat
import zipfile
from pathlib import Path

import pytest

from caption_train.errors import DatasetError
from caption_train.unpacking import unpack


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def write(folder: Path, *entries: tuple[zipfile.ZipInfo, bytes]) -> Path:
    path = folder / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in (*entries, (entry("t/good.jpg"), b"good")):
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return path


@pytest.mark.parametrize(
    "name",
    ["../evil.jpg", "t/../../evil.jpg", "/evil.jpg", "C:/evil.jpg", "t/..\\..\\evil.jpg", "\\\\host\\evil.jpg"],
)
def test_no_climbing_out(tmp_path: Path, name: str) -> None:
    info = entry("x")
    info.filename = info.orig_filename = name
    path = write(tmp_path, (info, b"evil"))
    with pytest.raises(DatasetError, match=r"a.zip, entry '.*': (it leads out of the folder|this is no file name)"):
        unpack(path, tmp_path / "out", "t/*.jpg")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_no_links_nor_devices(tmp_path: Path, kind: int) -> None:
    path = write(tmp_path, (entry("t/link.jpg", kind | 0o777), b"/etc/passwd"))
    with pytest.raises(DatasetError, match=r"entry 't/link.jpg': it is a link or a device"):
        unpack(path, tmp_path / "out", "t/*.jpg")
    assert not (tmp_path / "out").exists()


def test_no_bombs(tmp_path: Path) -> None:
    path = write(tmp_path, (entry("t/bomb.jpg"), bytes(10**7)))
    with pytest.raises(DatasetError, match=r"would grow from .* to 10,000,004 bytes: it is a decompression bomb"):
        unpack(path, tmp_path / "out", "t/*.jpg")
    assert unpack(path, tmp_path / "out", "t/good*.jpg") == (1, 4)


def test_no_more_than_the_directory_says(tmp_path: Path) -> None:
    path = write(tmp_path, (entry("t/lie.jpg"), bytes(100_000)))
    data = path.read_bytes().replace((100_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"t/lie.jpg is damaged"):
        unpack(path, tmp_path / "out", "t/*.jpg")
    assert not list((tmp_path / "out" / "t").iterdir())


def test_two_files_of_one_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write(tmp_path, (entry("t/good.jpg"), b"other"))
    with pytest.raises(DatasetError, match="holds two files of one name"):
        unpack(path, tmp_path / "out", "t/*.jpg")


def test_damage_is_found_by_the_checksum_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("t/a.jpg", b"a" * 50)
        archive.writestr("t/b.jpg", b"b" * 50)
    path.write_bytes(path.read_bytes().replace(b"b" * 50, b"b" * 49 + b"c"))
    with pytest.raises(DatasetError, match=r"t/b.jpg is damaged \(Bad CRC-32 .*delete the archive to have it fetched"):
        unpack(path, tmp_path / "out", "t/*.jpg")
    assert [file.name for file in (tmp_path / "out" / "t").iterdir()] == ["a.jpg"]
    assert (tmp_path / "out" / "t" / "a.jpg").read_bytes() == b"a" * 50


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_that_the_compression_finds_is_not_the_disks(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("t/a.jpg", random.Random(1).randbytes(5000) + b"x" * 5000)
    data = bytearray(path.read_bytes())
    data[200:1500] = bytes(byte ^ 0x5A for byte in data[200:1500])
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"t/a.jpg is damaged \(.*\): delete the archive to have it fetched"):
        unpack(path, tmp_path / "out", "t/*.jpg")
    assert not list((tmp_path / "out" / "t").iterdir())


def test_a_pattern_is_that_of_the_files_that_are_counted_afterwards(tmp_path: Path) -> None:
    path = write(tmp_path, (entry("t/below/a.jpg"), b"a"), (entry("s/t/a.jpg"), b"a"), (entry("t/a.txt"), b"a"))
    assert unpack(path, tmp_path / "out", "t/*.jpg") == (1, 4)
    assert [found.name for found in (tmp_path / "out").glob("t/*.jpg")] == ["good.jpg"]


def test_encrypted(tmp_path: Path) -> None:
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="it is encrypted"):
        unpack(path, tmp_path / "out", "t/*.jpg")


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "t").touch()  # a file where a folder is needed stands for any trouble of the disk
    with pytest.raises(DatasetError, match=r"good.jpg cannot be written .* give the same command again to go on"):
        unpack(path, tmp_path / "out", "t/*.jpg")


def test_packed_in_a_way_that_is_not_known(tmp_path: Path) -> None:
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(mark) + offset] = 99
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"t/good.jpg is damaged \(That compression method is not supported\)"):
        unpack(path, tmp_path / "out", "t/*.jpg")


def test_no_archive_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"<html>Moved</html>")
    with pytest.raises(DatasetError, match=r"a.zip is no zip file, or damaged .*: delete it to have it fetched again"):
        unpack(path, tmp_path / "out", "t/*.jpg")
    path.unlink()
    path.mkdir()
    with pytest.raises(DatasetError, match=r"a.zip cannot be read \(Is a directory\): check its permissions"):
        unpack(path, tmp_path / "out", "t/*.jpg")
