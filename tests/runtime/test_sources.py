"""What to caption: which photos of which folders, in which order, and what standard input says."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from caption_rt.errors import OptionsError
from caption_rt.image import PHOTO_SUFFIXES
from caption_rt.sources import Selection, find_sources, parse_shard


@pytest.fixture
def tree(tmp_path):
    """A folder with subfolders, links, hidden things and other files."""
    for name in (
        *("b.jpg", "a.JPG", "notes.txt", ".hidden.jpg", "c.png.txt"),
        *("sub/z.webp", "sub/deeper/y.heic", "sub.jpg/inside.gif", ".hidden/x.jpg", "raw/r.jpg", "raw/cr/s.tiff"),
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "photos"


def found(*arguments, **keywords):
    return [source.path for source in find_sources(map(str, arguments), **keywords)]


def below(tree, **selection):
    return [source.relative for source in find_sources([str(tree)], Selection(**selection))]


EVERYTHING = ["a.JPG", "b.jpg", "raw/cr/s.tiff", "raw/r.jpg", "sub/deeper/y.heic", "sub/z.webp", "sub.jpg/inside.gif"]


def test_a_folder_gives_its_photos_in_the_order_of_names(tree):
    assert below(tree) == EVERYTHING
    assert found(tree) == [os.path.join(tree, name) for name in EVERYTHING]


def test_files_are_taken_as_they_are_named_and_in_that_order(tree):
    named = [tree / "notes.txt", tree / ".hidden.jpg", "missing.jpg", tree / "b.jpg", tree / "b.jpg"]
    sources = list(find_sources(map(str, named)))
    assert [source.path for source in sources] == [str(path) for path in named]
    assert all(source.named for source in sources)
    assert not any(source.named for source in find_sources([str(tree)]))


def test_a_hidden_folder_that_is_named_is_gone_through(tree):
    assert found(tree / ".hidden") == [str(tree / ".hidden" / "x.jpg")]


def test_every_suffix_is_taken_in_capitals_or_not(tmp_path):
    for number, suffix in enumerate(sorted(PHOTO_SUFFIXES)):
        (tmp_path / f"{number}{suffix}").touch()
        (tmp_path / f"{number}x{suffix.upper()}").touch()
    assert len(found(tmp_path)) == 2 * len(PHOTO_SUFFIXES)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.jpg"], [], ["a.JPG", "b.jpg", "raw/r.jpg", "sub.jpg/inside.gif"]),
        (["B.*"], [], ["b.jpg"]),
        (["raw"], [], ["raw/cr/s.tiff", "raw/r.jpg"]),
        (["raw/*"], ["cr"], ["raw/r.jpg"]),
        (["sub/*.webp", "a.*"], [], ["a.JPG", "sub/z.webp"]),
        ([], ["sub*"], ["a.JPG", "b.jpg", "raw/cr/s.tiff", "raw/r.jpg"]),
        ([], ["raw/", "sub.jpg"], ["a.JPG", "b.jpg", "sub/deeper/y.heic", "sub/z.webp"]),
        ([], ["/raw"], ["a.JPG", "b.jpg", "sub/deeper/y.heic", "sub/z.webp", "sub.jpg/inside.gif"]),
        ([], ["[ab].jpg", "*/*"], []),
        (["*"], [], EVERYTHING),
    ],
)
def test_patterns(tree, include, exclude, expected):
    assert below(tree, include=tuple(include), exclude=tuple(exclude)) == expected


def test_patterns_leave_alone_what_was_named(tree):
    assert found(tree / "b.jpg", selection=Selection(exclude=("*",))) == [str(tree / "b.jpg")]


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_links_in_circles_end(tree):
    (tree / "sub" / "up").symlink_to(tree)
    (tree / "sub" / "self.jpg").symlink_to(tree / "sub" / "self.jpg")
    (tree / "sub" / "here").symlink_to(".")
    (tree / "zzz").symlink_to(tree / "raw")  # a second way to a folder
    (tree / "gone.jpg").symlink_to("nowhere")
    # A link that leads nowhere is a photo that cannot be read, not one that is passed over.
    assert sorted(below(tree)) == sorted([*EVERYTHING, "gone.jpg", "sub/self.jpg"])


@pytest.mark.skipif(sys.platform == "win32", reason="paths of Windows are shorter")
def test_a_tree_deeper_than_pythons_stack(tmp_path):
    path = tmp_path.joinpath(*["d"] * 400)
    path.mkdir(parents=True)
    (path / "deep.jpg").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200)
    try:
        assert below(tmp_path) == ["d/" * 400 + "deep.jpg"]
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root can become another user")
def test_a_folder_that_may_not_be_looked_into_is_one_source_with_an_error():
    # Where another user may look: TMPDIR may be root's own.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        tree = Path(folder)
        tree.chmod(0o755)
        for name in ("a", "locked", "z"):
            (tree / name).mkdir(mode=0o755)
            (tree / name / "photo.jpg").touch()
        (tree / "locked").chmod(0)
        os.seteuid(65534)
        try:
            sources = list(find_sources([folder], Selection(shard=(1, 1))))
            assert [source.relative for source in sources] == ["a/photo.jpg", "locked", "z/photo.jpg"]
            assert str(sources[1].error) == (
                f"the folder {tree / 'locked'} cannot be looked into: Permission denied: check its permissions"
            )
            # It is told by every shard, because its photos may belong to any.
            for part in (1, 2, 3):
                errors = [source for source in find_sources([folder], Selection(shard=(part, 3))) if source.error]
                assert [source.path for source in errors] == [str(tree / "locked")]
        finally:
            os.seteuid(0)


def test_every_photo_is_in_exactly_one_shard(tmp_path):
    names = [f"{folder}/{number}.jpg" for folder in "abc" for number in range(40)]
    for name in names:
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).touch()
    parts = [below(tmp_path / "one", shard=(part, 8)) for part in range(1, 9)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(5 <= len(part) <= 30 for part in parts)
    # Photos that come later, and another place of the folder, change nothing for those that are there.
    (tmp_path / "one" / "a" / "000.jpg").touch()
    (tmp_path / "one").rename(tmp_path / "two")
    later = [below(tmp_path / "two", shard=(part, 8)) for part in range(1, 9)]
    assert [[name for name in part if name != "a/000.jpg"] for part in later] == parts


def test_what_a_shard_is_is_written_down():
    """A machine with the next version of caption-rt must divide as the others do."""
    selection = [Selection(shard=(part, 4)) for part in range(1, 5)]
    names = ["a.jpg", "2024/b.jpg", "Grüße 猫.jpg", os.fsdecode(b"\xff.jpg")]
    assert [[one.in_shard(name) for one in selection].index(True) + 1 for name in names] == [2, 1, 1, 3]


@pytest.mark.parametrize("text", ["", "2", "2/", "/8", "a/b", "-1/8", "1.5/2", "2/8/9", "1" * 30 + "/2"])
def test_a_shard_that_is_no_shard(text):
    with pytest.raises(OptionsError, match="a shard is written as 2/8"):
        parse_shard(text)


@pytest.mark.parametrize("text", ["0/8", "9/8", "0/0"])
def test_a_shard_that_is_not_there(text):
    with pytest.raises(OptionsError, match=f"a shard is 1/8 to 8/8, say, not {text}"):
        Selection(shard=parse_shard(text))


def piped(*pieces, **keywords):
    """What comes of standard input, a real pipe."""
    reading, writing = os.pipe()
    for piece in pieces:
        os.write(writing, piece)
    os.close(writing)
    with os.fdopen(reading, "rb") as stdin:
        return list(find_sources(["-"], stdin=stdin, **keywords))


def test_a_list_on_standard_input(tree):
    lines = f"{tree / 'b.jpg'}\n\nmissing one.jpg\r\n{tree / 'raw'}\nhttp://127.0.0.1/a.jpg".encode()
    sources = piped(lines)
    raw = [os.path.join(tree, "raw", name) for name in ("cr/s.tiff", "r.jpg")]
    assert [source.path for source in sources] == [
        *(str(tree / "b.jpg"), "missing one.jpg"),
        *raw,
        "http://127.0.0.1/a.jpg",
    ]
    assert not any(source.named for source in sources)
    assert [source.is_address for source in sources] == [False] * 4 + [True]


def test_names_with_line_breaks_and_bytes_that_are_no_text(tmp_path):
    names = [b"two\nlines.jpg", b"\xff\xfe.jpg", b"carriage\r.jpg"]
    assert [source.path for source in piped(b"\0".join(names) + b"\0", null=True)] == [*map(os.fsdecode, names)]
    assert [source.path for source in piped(b"\xff\xfe.jpg\n")] == [os.fsdecode(b"\xff\xfe.jpg")]


def test_a_long_list_comes_piece_by_piece():
    names = [f"{'x' * 90}/{number}.jpg" for number in range(600)]
    assert [source.path for source in piped("\n".join(names).encode())] == names


def test_a_list_is_used_while_it_is_made():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stdin:
        sources = find_sources(["-"], stdin=stdin)
        os.write(writing, b"first.jpg\n")
        assert next(sources).path == "first.jpg"
        os.write(writing, b"second.jpg\nthi")
        assert next(sources).path == "second.jpg"
        os.write(writing, b"rd.jpg\n")
        assert next(sources).path == "third.jpg"
        os.close(writing)
        assert next(sources, None) is None


def test_bytes_of_an_image_on_standard_input(photos):
    data = photos[0].read_bytes()
    (source,) = piped(data)
    assert (source.path, source.data, source.name, source.named) == ("-", data, "standard input", True)
    for head in (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"GIF89a\x0a\x00\x0a\x00\x80",
        b"II*\0\x08\0\0\0",
        b"RIFF\x24\0\0\0WEBPVP8 ",
    ):
        (source,) = piped(head)
        assert source.data == head
    # Its beginning may come in pieces, and with line breaks in it.
    (source,) = piped(b"\x89PNG\r\n", b"\x1a\n\0\0\0\rIHDR")
    assert source.data == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def test_an_image_on_standard_input_that_is_too_large():
    (source,) = piped(b"\xff\xd8\xff" + bytes(200), max_bytes=100)
    assert "standard input has more than 100 bytes: raise --max-bytes" in str(source.error)


def test_what_standard_input_is_not(tmp_path):
    assert piped(b"") == []
    (tmp_path / "novel").write_bytes(b"It was a dark and stormy night. " * 5000)
    with (
        (tmp_path / "novel").open("rb") as stdin,
        pytest.raises(OptionsError, match="standard input is neither an image nor a list of paths"),
    ):
        list(find_sources(["-"], stdin=stdin))


def test_standard_input_can_be_read_once():
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading, "rb") as stdin, pytest.raises(OptionsError, match="give - only once"):
        list(find_sources(["-", "-"], stdin=stdin))
