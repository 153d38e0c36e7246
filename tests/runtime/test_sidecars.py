"""Sidecars: whose file is whose, nothing destroyed, and XMP of other programs kept to the byte."""

import json
import subprocess
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from caption_rt.errors import CaptionError, ImageError, OptionsError
from caption_rt.records import Record
from caption_rt.sidecars import MODES, namesakes, sidecar_bytes, sidecar_path
from made_captions import caption_of

DOG = Record("photos/a.jpg", caption_of("a dog runs"))

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"

# As darktable, Lightroom and digiKam write theirs, shortened.
FOREIGN = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <!-- kept -->
  <rdf:Description rdf:about=""
    xmlns:xmp='http://ns.adobe.com/xap/1.0/'
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:darktable="http://darktable.sf.net/"
   xmp:Rating="4" darktable:history_end="3">
   <dc:subject>
    <rdf:Bag>
     <rdf:li>holiday &gt; 2020</rdf:li>
    </rdf:Bag>
   </dc:subject>@
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
                                        \n<?xpacket end="w"?>\n"""

DESCRIPTION = """
   <dc:description>
    <rdf:Alt>
     <rdf:li xml:lang="de">Ein Hund</rdf:li>
     <rdf:li xml:lang="x-default">our dog &amp; I</rdf:li>
    </rdf:Alt>
   </dc:description>"""


def foreign(description=""):
    return FOREIGN.replace("@", description).encode()


def merged(existing, mode="append", text="a dog runs"):
    return sidecar_bytes("xmp", Record("a.jpg", caption_of(text)), existing, mode)


def description_of(xmp):
    """The description by language, read with another parser than ours."""
    (element,) = ElementTree.fromstring(xmp).iter(f"{DC}description")
    return {
        item.get("{http://www.w3.org/XML/1998/namespace}lang"): item.text
        for item in element.findall(f"{RDF}Alt/{RDF}li")
    }


@pytest.mark.parametrize(
    ("photo", "siblings", "names"),
    [
        ("a.jpg", [], "a.txt a.xmp"),
        ("a.jpg", ["a.jpg", "b.jpg", "ab.jpg"], "a.txt a.xmp"),
        ("a.jpg", ["a.jpg", "a.png"], "a.jpg.txt a.jpg.xmp"),
        ("a.png", ["a.jpg"], "a.png.txt a.png.xmp"),
        ("a.jpg", ["A.PNG"], "a.jpg.txt a.jpg.xmp"),
        ("a.jpg", ["a.JPG"], "a.jpg.txt a.jpg.xmp"),
        ("straße.jpg", ["STRASSE.png"], "straße.jpg.txt straße.jpg.xmp"),
        ("a.b.jpg", ["a.b.png", "a.jpg"], "a.b.jpg.txt a.b.jpg.xmp"),
        ("a.jpg", ["a.jpg.png"], "a.txt a.xmp"),
        ("a.jpg.png", ["a.jpg"], "a.jpg.png.txt a.jpg.png.xmp"),
        ("photo", ["photo.jpg"], "photo.txt photo.xmp"),
        (".jpg", ["a.jpg"], ".jpg.txt .jpg.xmp"),
    ],
)
def test_whose_file_is_whose(tmp_path, photo, siblings, names):
    for name, expected in zip(("txt", "xmp"), names.split(), strict=True):
        assert sidecar_path(tmp_path / photo, name, siblings) == tmp_path / expected


def test_no_two_photos_share_a_sidecar_and_their_namesakes_are_all_that_matters(tmp_path):
    names = [
        "a",
        "a.jpg",
        "a.png",
        "A.jpg",
        "a.jpg.png",
        "a.jpg.PNG",
        "b.jpg",
        "b.jpg.jpg",
        "b",
        "c.gif",
        "c.gif.gif.gif",
    ]
    for some in combinations(names, 4):
        paths = [sidecar_path(tmp_path / name, "txt", some) for name in some]
        assert len(set(paths)) == len(some), some
        assert paths == [sidecar_path(tmp_path / name, "txt", namesakes(some)) for name in some], some
    assert namesakes(["a.jpg", "b.jpg", "B.png", "c.jpg", "c.jpg.png"]) == {"b.jpg", "B.png", "c.jpg"}


def test_an_xmp_file_that_another_program_keeps_is_used(tmp_path):
    (tmp_path / "a.jpg.xmp").write_bytes(foreign())
    (tmp_path / "a.jpg.txt").write_text("not ours")
    assert sidecar_path(tmp_path / "a.jpg", "xmp", []) == tmp_path / "a.jpg.xmp"
    assert sidecar_path(tmp_path / "a.jpg", "txt", []) == tmp_path / "a.txt"


def test_a_new_text_file_is_the_caption():
    for mode in MODES:
        assert sidecar_bytes("txt", DOG, None, mode) == b"a dog runs\n"


@pytest.mark.parametrize(
    ("existing", "appended"),
    [
        (b"a cat\n", b"a cat\na dog runs\n"),
        (b"a cat", b"a cat\na dog runs\n"),
        (b"", b"a dog runs\n"),
        (b"a cat\r\nsleeps", b"a cat\r\nsleeps\r\na dog runs\r\n"),
        (b"caf\xe9\n", b"caf\xe9\na dog runs\n"),
        ("\ufeffa cat\n".encode(), "\ufeffa cat\na dog runs\n".encode()),
        ("a cat\r\n".encode("utf-16"), "a cat\r\na dog runs\r\n".encode("utf-16")),
        ("\ufeffa cat".encode("utf-16-be"), "\ufeffa cat\na dog runs\n".encode("utf-16-be")),
        (b"a dog runs\n", None),
        (b"a cat\n a dog runs \r\nmore\n", None),
        ("\ufeffa dog runs".encode(), None),
        ("a dog runs".encode("utf-16"), None),
    ],
)
def test_text_that_is_there_gets_a_further_line(existing, appended):
    assert sidecar_bytes("txt", DOG, existing, "append") == appended
    assert sidecar_bytes("txt", DOG, existing, "skip") is None
    assert sidecar_bytes("txt", DOG, existing, "overwrite") == (
        None if existing == b"a dog runs\n" else b"a dog runs\n"
    )


@pytest.mark.parametrize("damaged", [b"\xff\xfea", b"\xfe\xff\0a\0"])
def test_damaged_text_is_left_as_it_is(damaged):
    with pytest.raises(CaptionError) as caught:
        sidecar_bytes("txt", DOG, damaged, "append")
    assert str(caught.value) == "the text file of photos/a.jpg is left as it is: it is not text in UTF-16"
    assert caught.value.reason == "has a text file that nothing can be added to"


@pytest.mark.parametrize("name", ["txt", "xmp"])
def test_nothing_is_written_without_a_caption(name):
    for result in (ImageError("a.jpg is empty"), caption_of("")):
        for mode in MODES:
            assert sidecar_bytes(name, Record("a.jpg", result), None, mode) is None


def test_what_cannot_be_meant():
    with pytest.raises(OptionsError, match="treated by skip, append, overwrite, not by 'replace'"):
        sidecar_bytes("txt", DOG, None, "replace")
    for call in (lambda: sidecar_bytes("csv", DOG, None), lambda: sidecar_path(Path("a.jpg"), "csv", [])):
        with pytest.raises(OptionsError, match="a sidecar's format is txt or xmp, not 'csv'"):
            call()


def test_a_new_xmp_file_is_a_packet_with_the_description():
    xmp = sidecar_bytes("xmp", Record("a.jpg", caption_of("a <b> & 'c' \ufffe")), None)
    assert xmp.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'.encode())
    assert xmp.endswith(b'<?xpacket end="w"?>\n')
    assert description_of(xmp) == {"x-default": "a <b> & 'c' \ufffd"}
    assert ElementTree.fromstring(xmp).tag == "{adobe:ns:meta/}xmpmeta"
    assert merged(xmp, "skip") is None


@pytest.mark.parametrize("mode", ["append", "overwrite"])
@pytest.mark.parametrize("empty", [b"", b" \n"])
def test_an_empty_xmp_file_counts_as_none(mode, empty):
    assert merged(empty, mode) == merged(None)


@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_a_description_is_put_into_what_another_program_wrote(mode):
    xmp = merged(foreign(), mode)
    assert xmp == foreign("""
   <dc:description>
    <rdf:Alt>
     <rdf:li xml:lang="x-default">a dog runs</rdf:li>
    </rdf:Alt>
   </dc:description>""")
    assert merged(xmp, mode) is None


def test_a_description_that_is_there_gets_a_further_line():
    xmp = merged(foreign(DESCRIPTION))
    assert xmp == foreign(DESCRIPTION.replace("&amp; I", "&amp; I\na dog runs"))
    assert description_of(xmp) == {"de": "Ein Hund", "x-default": "our dog & I\na dog runs"}
    assert merged(xmp) is None
    assert description_of(merged(xmp, text="a < b"))["x-default"] == "our dog & I\na dog runs\na < b"


def test_overwriting_replaces_the_description_and_nothing_else():
    xmp = merged(foreign(DESCRIPTION), "overwrite")
    assert description_of(xmp) == {"x-default": "a dog runs"}
    assert xmp == merged(foreign(), "overwrite")


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("<dc:description><rdf:Alt><rdf:li xml:lang='x-default'/></rdf:Alt></dc:description>", "a dog runs"),
        ("<dc:description><rdf:Alt><rdf:li xml:lang='x-default'> </rdf:li></rdf:Alt></dc:description>", "a dog runs"),
        ("<dc:description><rdf:Alt/></dc:description>", "a dog runs"),
        ("<dc:description/>", "a dog runs"),
        ("<dc:description>plain &lt;</dc:description>", "plain <\na dog runs"),
        ("<dc:description><![CDATA[a < b]]></dc:description>", "a < b\na dog runs"),
        (
            "<dc:description><rdf:Alt><rdf:li xml:lang='X-Default'>é\n2</rdf:li></rdf:Alt></dc:description>",
            "é\n2\na dog runs",
        ),
    ],
)
def test_other_ways_to_state_a_description_are_extended(description, expected):
    (text,) = description_of(merged(foreign(description))).values()
    assert text == expected
    assert description_of(merged(foreign(description), "overwrite")) == {"x-default": "a dog runs"}


def test_without_a_default_language_the_first_is_extended():
    xmp = merged(foreign(DESCRIPTION.replace("x-default", "en")))
    assert description_of(xmp) == {"de": "Ein Hund\na dog runs", "en": "our dog & I"}


@pytest.mark.parametrize("quote", ['"', "'"])
def test_a_description_that_is_an_attribute_becomes_an_element(quote):
    stated = f"\n   dc:description={quote}the &quot;old&quot; > one{quote}"
    existing = foreign().replace(b'\n   xmp:Rating="4"', f'{stated}\n   xmp:Rating="4"'.encode())
    xmp = merged(existing)
    assert description_of(xmp) == {"x-default": 'the "old" > one\na dog runs'}
    assert xmp.replace(b'the "old" &gt; one\n', b"") == merged(foreign())
    assert merged(existing, "overwrite") == merged(foreign(), "overwrite")
    assert merged(foreign().replace(b'xmp:Rating="4"', b'dc:description=" a dog runs"')) is None


@pytest.mark.parametrize(
    "body",
    [
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>',
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"> </rdf:RDF>',
        '<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><r:Description r:about=""/></r:RDF>',
        '<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>',
        '<RDF xmlns="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:rdf="other:" xmlns:dc="other:">'
        '<Description dc:description="no"/></RDF>',
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" note="a > b"/></rdf:RDF></x:xmpmeta>',
    ],
)
@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_any_prefix_and_any_empty_element_will_do(body, mode):
    xmp = merged(body.encode(), mode)
    assert description_of(xmp) == {"x-default": "a dog runs"}
    (described,) = ElementTree.fromstring(xmp).iter(f"{RDF}Description")
    assert [child.tag for child in described] == [f"{DC}description"]
    assert merged(xmp, mode) is None


def test_a_description_of_something_else_is_left_alone():
    deeper = '<rdf:Description dc:description="t"><dc:description>t</dc:description></rdf:Description>'
    inner = f"<xmp:Thumb>{deeper}</xmp:Thumb>"
    xmp = merged(foreign(inner), "overwrite").decode()
    assert inner in xmp
    assert xmp.count("a dog runs") == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_the_encoding_stays(encoding):
    declared = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n'
    existing = (declared + foreign(DESCRIPTION.replace("dog", "Hündin")).decode()).encode(encoding)
    assert description_of(merged(existing))["x-default"] == "our Hündin & I\na dog runs"
    assert merged(existing).decode(encoding).startswith(declared)


def test_line_breaks_stay():
    existing = foreign(DESCRIPTION).replace(b"\n", b"\r\n")
    assert merged(existing).replace(b"\na dog runs", b"") == existing


@pytest.mark.parametrize(
    ("existing", "reason"),
    [
        (b"no XML", "it is not well-formed XML: syntax error in line 1"),
        (foreign()[:-200], "it is not well-formed XML: unclosed token in line "),
        (foreign("<dc:x>"), "it is not well-formed XML: mismatched tag"),
        (foreign("&undefined;"), "it is not well-formed XML: undefined entity"),
        (b"<html><body/></html>", "it is not XMP: there is no rdf:RDF in it"),
        (b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x>&b;</x>', "it has a document type declaration"),
        (b'<!DOCTYPE x SYSTEM "http://127.0.0.1/x.dtd"><x/>', "it has a document type declaration"),
        (b"<?xml version='1.0' encoding='latin-1'?><x/>", "XMP is in UTF-8, and it says that it is in latin-1"),
        (b"<x>caf\xe9</x>", "it is not text in UTF-8"),
        (b"\xff\xd8\xff\xe0", "it is not text in UTF-8"),
        (
            foreign("<dc:description rdf:parseType='Resource'><rdf:value>x</rdf:value></dc:description>"),
            "its dc:description is stated in a way that cannot be added to",
        ),
        (
            foreign("<dc:description><rdf:Alt><rdf:li><rdf:value>x</rdf:value></rdf:li></rdf:Alt></dc:description>"),
            "its dc:description is stated in a way that cannot be added to",
        ),
    ],
)
def test_what_cannot_be_added_to_is_refused_in_one_sentence(existing, reason):
    with pytest.raises(CaptionError) as caught:
        merged(existing)
    assert str(caught.value).startswith(f"the XMP file of a.jpg is left as it is: {reason}")
    assert str(caught.value).isprintable()
    assert merged(existing, "skip") is None


@pytest.mark.program("exiftool")
def test_exiftool_reads_what_was_written(tmp_path):
    (tmp_path / "new.xmp").write_bytes(merged(None))
    (tmp_path / "foreign.xmp").write_bytes(foreign(DESCRIPTION))
    # A file that exiftool itself made.
    subprocess.run(
        ["exiftool", "-q", "-XMP-xmp:Rating=5", "-XMP-dc:Title=Rex", "-XMP-dc:Description=ours", tmp_path / "own.xmp"],
        check=True,
    )
    for name in ("foreign", "own"):
        path = tmp_path / f"{name}.xmp"
        path.write_bytes(merged(path.read_bytes(), "append"))
    shown = subprocess.run(
        ["exiftool", "-j", "-G1", "-warning", "-validate", "-XMP:all", *sorted(tmp_path.glob("*.xmp"))],
        capture_output=True,
        text=True,
        check=True,
    )
    read = {Path(entry["SourceFile"]).stem: entry for entry in json.loads(shown.stdout)}
    assert read["new"]["XMP-dc:Description"] == "a dog runs"
    assert read["foreign"]["XMP-dc:Description"] == "our dog & I\na dog runs"
    assert read["foreign"]["XMP-dc:Description-de"] == "Ein Hund"
    assert (read["foreign"]["XMP-xmp:Rating"], read["foreign"]["XMP-dc:Subject"]) == (4, "holiday > 2020")
    assert read["own"]["XMP-dc:Description"] == "ours\na dog runs"
    assert (read["own"]["XMP-xmp:Rating"], read["own"]["XMP-dc:Title"]) == (5, "Rex")
    assert not [key for entry in read.values() for key in entry if key.endswith("Warning")]


def test_a_damaged_xmp_file_is_refused_or_still_whole_afterwards():
    existing = foreign(DESCRIPTION)
    damaged = [existing[:end] for end in range(1, len(existing), 7)]
    damaged += [
        existing[:at] + char + existing[at + 1 :] for at in range(0, len(existing), 5) for char in (b"<", b'"', b"\xff")
    ]
    kept = 0
    for some in damaged:
        try:
            xmp = merged(some)
        except CaptionError:
            continue
        kept += 1
        assert xmp is not None
        assert "a dog runs" in "".join(ElementTree.fromstring(xmp).itertext())
    assert 10 < kept < len(damaged) / 2
