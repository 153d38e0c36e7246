"""What to caption: which photos of which folders, in which order, and what standard input says."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from caption_rt._sniff import PHOTO_SUFFIXES
from caption_rt.errors import OptionsError
from caption_rt.sources import Selection, Source, distinct, find_sources, parse_shard


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
                f"the folder {tree / 'locked'} cannot be looked into (Permission denied): check its permissions"
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


@pytest.mark.parametrize("null", [False, True])
def test_a_list_is_used_while_it_is_made(null):
    end = b"\0" if null else b"\n"
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stdin:
        sources = find_sources(["-"], stdin=stdin, null=null)
        os.write(writing, b"first.jpg" + end)
        assert next(sources).path == "first.jpg"
        os.write(writing, b"second.jpg" + end + b"thi")
        assert next(sources).path == "second.jpg"
        os.write(writing, b"rd.jpg" + end)
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
    assert str(source.error) == "standard input has more than 100 bytes: raise max_bytes to read it"


def test_nothing_on_standard_input_is_an_empty_list_only_where_a_list_is_meant():
    assert piped(b"", may_be_empty=True) == piped(b"", null=True) == piped(b"\n\r\n") == []
    assert piped(b"", stopped=lambda: True) == []
    (source,) = piped(b"")
    assert (source.path, source.name) == ("-", "standard input")
    assert str(source.error) == "standard input is empty: neither a photo nor a list of paths came"


def test_a_mark_before_the_first_name_is_none_of_it():
    """Editors of Windows begin UTF-8 with one."""
    assert [source.path for source in piped(b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n")] == ["a.jpg", "b.jpg"]
    with pytest.raises(OptionsError, match="the list on standard input is UTF-16 text: save it as UTF-8"):
        piped("a.jpg\nb.jpg\n".encode("utf-16"))


FORGOTTEN = "standard input has a zero byte between its names: say null"
LATER = (
    "a line of standard input has a zero byte in it, which no name has: "
    "say null if it is a list in which each name ends in one"
)
NEEDLESS = "standard input has line breaks between its names and no zero byte: leave out null"


def test_a_list_of_the_other_kind_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"photos/{number}.jpg" for number in range(2000)]
    long = "x" * 100
    (tmp_path / "p").mkdir()
    for text in ("\0".join(names), "a.jpg\0", "p\0", f"{long}\0{long}\0", f"{long}\n{long}\0b"):
        with pytest.raises(OptionsError) as caught:
            piped(text.encode())
        said = FORGOTTEN if text.index("\0") < 64 else LATER
        assert str(caught.value.renamed({"null": "-0"})) == said.replace("null", "-0")
    for text in ("\n".join(names) + "\n", "a.jpg\nb.jpg", "\n".join(names * 100)[: (1 << 16) - 1]):
        with pytest.raises(OptionsError, match=NEEDLESS):
            piped(text.encode(), null=True)
    # One name may have a line break, and the last one lack its end.
    (tmp_path / "two\nlines.jpg").touch()
    assert [source.path for source in piped(b"two\nlines.jpg", null=True)] == ["two\nlines.jpg"]
    with pytest.raises(OptionsError, match="standard input is a photo, and null is about a list: leave it out"):
        piped(b"\xff\xd8\xff\xe0" + bytes(100), null=True)


def test_noise_is_one_source_and_a_name_with_odd_characters_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = b"\xc3\x01\x9f\x02" * 50
    assert [source.data for source in piped(noise)] == [noise]
    (tmp_path / "\x1bodd\x07.jpg").touch()
    assert [source.path for source in piped(b"\x1bodd\x07.jpg\nb.jpg\n")] == ["\x1bodd\x07.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "document", [b"%PDF-1.7\n1 0 obj", b"<!DOCTYPE html>\n<title>", b'<?xml version="1.0"?>\n', b'{"path": "a.jpg"}\n']
)
def test_another_document_is_one_source_and_no_list(document):
    (source,) = piped(document)
    assert source.data == document


def test_addresses_of_files_are_their_paths_and_others_are_not_read(tree):
    address = tree.as_uri()
    assert found(f"{address}/b.jpg", f"{address.replace('///', '//localhost/')}/raw") == [
        str(tree / "b.jpg"),
        *(str(tree / "raw" / name) for name in ("cr/s.tiff", "r.jpg")),
    ]
    odd = tree / "a%20b #1?\udcff.jpg"
    assert found(odd.as_uri()) == [str(odd)]
    for address, sentence in {
        "ftp://host/a.jpg": "is an address of the kind ftp, and only http, https and file are read: fetch it first",
        "S3://bucket/a.jpg": "is an address of the kind s3, and only http, https and file are read: fetch it first",
        "file://host/a.jpg": "names a file of another machine: a path here is file:///path",
        "file://[/a.jpg": "names a file of another machine: a path here is file:///path",
    }.items():
        (source,) = find_sources([address])
        assert (source.path, str(source.error)) == (address, f"{address} {sentence}")
    assert [source.error for source in find_sources(["c:/a.jpg", "a:b.jpg", "http://a/b"])] == [None] * 3


def test_each_photo_once_whatever_it_is_called(tree, monkeypatch):
    monkeypatch.chdir(tree)
    names = ["raw", "raw/r.jpg", "./raw//r.jpg", str(tree / "raw" / "r.jpg"), "b.jpg", "raw/../b.jpg", "none.jpg"]
    sources = list(distinct(find_sources([*names, "none.jpg", "http://a/b.jpg", "http://a/b.jpg", "http://a/./b.jpg"])))
    assert [source.path for source in sources] == [
        *("raw/cr/s.tiff", "raw/r.jpg", "b.jpg", "none.jpg", "http://a/b.jpg", "http://a/./b.jpg")
    ]
    bytes_twice = [Source("-", "-", True, b"1"), Source("-", "-", True, b"1")]
    assert list(distinct(bytes_twice)) == bytes_twice


def test_an_empty_pattern_is_refused():
    for name in ("include", "exclude"):
        for pattern in ("", "/"):
            with pytest.raises(OptionsError, match=f"a pattern of {name} is empty and matches nothing"):
                Selection(**{name: ("*.jpg", pattern)})


def test_what_standard_input_is_not(tmp_path):
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
