"""Line formats: what stands in them, one line a record whatever a photo is called, and files that can be cut."""

import csv
import io
import json

import pytest

from caption_rt.captioner import Captioner
from caption_rt.errors import EngineError, ImageError, OptionsError
from caption_rt.records import Record
from caption_rt.writers import FORMATS, LINE_FORMATS, SIDECAR_FORMATS, format_of, line_writer
from made_captions import caption_of

GOOD = Record("photos/a.jpg", caption_of("a dog runs", word_log_probs=(-0.5, -1.25, -1.5)))
BAD = Record("b.jpg", ImageError("b.jpg does not exist: check the path", reason="does not exist"))

# Names that a file may have: breaks, quotes, escapes of a terminal, undecodable bytes, separators of the formats.
HOSTILE = [
    'a"b.jpg',
    "a,b;c.jpg",
    "a\tb.jpg",
    "a\nb.jpg",
    "a\r\nb.jpg",
    "a\u2028b\x85c\x0bd.jpg",
    "\x1b[31mred.jpg",
    "caf\udce9.jpg",
    "café 猫.jpg",
    '"><script>alert(1)</script>.jpg',
    "-",
    "=1+1.jpg",
    "a\\n.jpg",
    '"a\\n.jpg"',
    "C:\\photos\\a.jpg",
    "caf\\udce9.jpg",
]


def as_named(cell):
    """A path from a table, turned back as docs/folders.md says."""
    name = json.loads(cell) if cell.startswith('"') else cell
    return name[2:] if name[:2] == "./" and name[2:3] in ("=", "+", "-", "@") else name


def written(name, *records):
    writer = line_writer(name)
    return writer.header + b"".join(writer.line(record) for record in records)


def test_json_lines_hold_the_whole_caption():
    good, bad = map(json.loads, written("jsonl", GOOD, BAD).splitlines())
    assert good == {"path": "photos/a.jpg", "status": "ok", **GOOD.result.to_dict()}
    assert (good["caption"], good["log_prob"], good["words"]) == ("a dog runs", -3.75, ["a", "dog", "runs"])
    assert bad == {
        "path": "b.jpg",
        "status": "error",
        "caption": None,
        "error": {
            "class": "ImageError",
            "reason": "does not exist",
            "message": "b.jpg does not exist: check the path",
        },
    }


def test_json_lines_are_ascii_and_give_every_name_back():
    records = [Record(name, GOOD.result) for name in HOSTILE] + [Record(name, ImageError(name)) for name in HOSTILE]
    lines = written("jsonl", *records).decode("ascii").splitlines()
    assert [json.loads(line)["path"] for line in lines] == HOSTILE * 2
    assert [json.loads(line)["error"]["message"] for line in lines[len(HOSTILE) :]] == HOSTILE


def test_csv_is_read_by_a_csv_reader():
    rows = list(csv.DictReader(io.StringIO(written("csv", GOOD, BAD).decode(), newline="")))
    assert rows == [
        {
            "path": "photos/a.jpg",
            "status": "ok",
            "caption": "a dog runs",
            "log_prob": "-3.75",
            "ended": "end",
            "strategy": "greedy",
            "provider": "CPUExecutionProvider",
            "precision": "fp32",
            "error_class": "",
            "error": "",
        },
        {
            **dict.fromkeys(("caption", "log_prob", "ended", "strategy", "provider", "precision"), ""),
            "path": "b.jpg",
            "status": "error",
            "error_class": "ImageError",
            "error": "b.jpg does not exist: check the path",
        },
    ]


def test_csv_quotes_as_rfc_4180_says():
    assert written("csv", Record('a "b", c.jpg', EngineError("no, and no"))).splitlines()[1] == (
        b'"a ""b"", c.jpg",error,,,,,,,EngineError,"no, and no"'
    )


def test_tsv_has_a_tab_between_columns_and_nowhere_else():
    assert written("tsv", GOOD, BAD).decode().split("\n") == [
        "path\tstatus\tcaption\tlog_prob\tended\tstrategy\tprovider\tprecision\terror_class\terror",
        "photos/a.jpg\tok\ta dog runs\t-3.75\tend\tgreedy\tCPUExecutionProvider\tfp32\t\t",
        "b.jpg\terror\t\t\t\t\t\t\tImageError\tb.jpg does not exist: check the path",
        "",
    ]
    (line,) = written("tsv", Record("a\tb\n.jpg", GOOD.result)).splitlines()[1:]
    assert line.split(b"\t")[0] == b'"a\\tb\\n.jpg"'


def test_text_is_path_and_caption_and_says_nothing_of_a_bad_photo():
    assert written("text", GOOD, BAD) == b"photos/a.jpg\ta dog runs\n"
    assert written("text", Record("caf\udce9\n.jpg", GOOD.result)) == b'"caf\\udce9\\n.jpg"\ta dog runs\n'


@pytest.mark.parametrize("name", LINE_FORMATS)
def test_every_record_is_one_line_of_utf_8_whatever_it_holds(name):
    writer = line_writer(name)
    for text in HOSTILE:
        for result in (caption_of(text), ImageError(text)):
            line = writer.line(Record(text, result)).decode("utf-8")
            if name == "text" and isinstance(result, ImageError):
                assert line == ""
            else:
                # Not only for tools that end lines at "\n": a form feed or U+2028 ends one elsewhere.
                assert line.splitlines(keepends=True) == [line]
                assert line.endswith("\n")
    assert writer.header.decode("utf-8")[-1:] in ("", "\n")


def test_paths_of_lines_can_be_turned_back():
    for name in ("csv", "tsv", "text"):
        assert len({written(name, Record(path, GOOD.result)) for path in HOSTILE}) == len(HOSTILE)
    paths = [
        line.split("\t")[0] for line in written("text", *(Record(p, GOOD.result) for p in HOSTILE)).decode().split("\n")
    ]
    assert [as_named(path) for path in paths[:-1]] == HOSTILE
    assert paths[-5:-1] == ["a\\n.jpg", '"\\"a\\\\n.jpg\\""', "C:\\photos\\a.jpg", "caf\\udce9.jpg"]


@pytest.mark.parametrize("name", ["csv", "tsv"])
def test_no_path_is_a_formula_of_a_spreadsheet(name):
    quoting = {"csv": {}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}[name]
    for path in ("=HYPERLINK(1)&.jpg", "+1.jpg", "-1.jpg", "@a.jpg", "=a\nb.jpg", "=1\t.jpg"):
        records = Record(path, GOOD.result), Record(path, ImageError(f"{path} is bad"))
        good, bad = list(csv.reader(io.StringIO(written(name, *records).decode(), newline=""), **quoting))[1:]
        for row in (good, bad):
            assert row[0][0] in './"'
            assert as_named(row[0]) == path
        assert bad[-1].startswith(f"./{path[:2]}")
    assert written(name, Record("-", GOOD.result)).splitlines()[1][:2] in (b"-,", b"-\t")


@pytest.mark.parametrize("name", ["csv", "tsv"])
def test_a_table_cut_at_any_line_is_a_table(name):
    # A TSV file (IANA text/tab-separated-values) knows no quotes.
    dialect = {"csv": {}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}[name]
    whole = written(name, *(Record(path, GOOD.result) for path in HOSTILE)).splitlines(keepends=True)
    for count in range(1, len(whole) + 1):
        rows = list(csv.reader(io.StringIO(b"".join(whole[:count]).decode(), newline=""), **dialect))
        assert len(rows) == count
        assert {len(row) for row in rows} == {10}
        assert [as_named(row[0]) for row in rows[1:]] == HOSTILE[: count - 1]


def test_a_real_caption_in_every_format(tiny_bundle, photos):
    with Captioner.load(tiny_bundle, "cpu") as captioner:
        record = Record(str(photos[2]), captioner.caption(photos[2]), b"\xff\xd8\xff")
    for name in LINE_FORMATS:
        line = line_writer(name).line(record)
        for word in record.result.words:
            assert word.encode() in line
    assert json.loads(line_writer("jsonl").line(record))["caption"] == "in dog cat ball cat"


def test_the_gallery_alone_wants_thumbnails():
    assert [name for name in LINE_FORMATS if line_writer(name).needs_thumbnail] == ["html"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("captions.jsonl", "jsonl"),
        ("a.b/captions.ndjson", "jsonl"),
        ("CAPTIONS.CSV", "csv"),
        ("captions.tsv", "tsv"),
        ("captions.html", "html"),
        ("captions.Htm", "html"),
    ],
)
def test_the_ending_names_the_format(path, name):
    assert format_of(path) == name


@pytest.mark.parametrize("path", ["captions", "captions.json", "captions.txt", ".csv", "a.csv/b", "caf\udce9\n.xlsx"])
def test_another_ending_names_none(path):
    with pytest.raises(
        OptionsError, match=r"names no format: end it in one of \.jsonl, .*\.htm, or say --format"
    ) as no:
        format_of(path)
    assert str(no.value).isprintable()


def test_formats_are_of_lines_or_beside_photos():
    assert FORMATS == ("jsonl", "csv", "tsv", "text", "html", "txt", "xmp")
    for name in SIDECAR_FORMATS:
        with pytest.raises(OptionsError, match=f"the format {name} is a file beside each photo, not one output"):
            line_writer(name)
    with pytest.raises(OptionsError, match="there is no format 'json': it is one of jsonl, csv, "):
        line_writer("json")
