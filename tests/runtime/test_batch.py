"""A run over many photos: order, batches, what is read when, and what a run tells about itself."""

import dataclasses
import json
import threading

import pytest

from caption_rt.batch import BatchSettings, caption_sources, run_key
from caption_rt.captioner import Captioner
from caption_rt.errors import CaptionError, EngineError, ImageError, OptionsError
from caption_rt.image import PhotoLimits
from caption_rt.options import DecodeOptions
from caption_rt.outputs import Entry, Known
from caption_rt.progress import ErrorsFile, Tally
from caption_rt.reading import Done, Job, Photo, PhotoReader
from caption_rt.sources import Source, find_sources
from running import BUNDLE, make_photo, make_photos


@pytest.fixture(scope="module")
def captioner():
    with Captioner.load(BUNDLE, "cpu") as loaded:
        yield loaded


class Kept:
    """An output in memory that notes what it is asked."""

    def __init__(self, known=None):
        self.known_sources = known or {}
        self.batches = []
        self.asked = []

    def known(self, source):
        self.asked.append(source.path)
        return self.known_sources.get(source.path)

    def write(self, entries):
        self.batches.append(list(entries))
        return entries


def run(captioner, folder, output, *, stopped=lambda: False, options=None, **settings):
    options = options or captioner.default_options
    sources = find_sources([str(folder)])
    return list(caption_sources(sources, captioner, options, output, BatchSettings(**settings), stopped=stopped))


def test_every_photo_has_one_record_in_order_whatever_the_threads(captioner, tmp_path):
    paths = [str(path) for path in make_photos(tmp_path, 23)]
    expected = [caption.text for caption in captioner.caption_many(paths)]
    for settings in (
        {"batch_size": 1},
        {"batch_size": 4, "workers": 3, "readers": 5},
        {"batch_size": 100, "readers": 1},
    ):
        finished = run(captioner, tmp_path, Kept(), **settings)
        assert [entry.source.path for entry in finished] == paths
        assert [entry.record.path for entry in finished] == paths
        assert [entry.record.result.text for entry in finished] == expected


def test_bad_photos_cost_their_own_record_and_no_place_in_a_batch(captioner, tmp_path):
    for number in range(10):
        if number in (0, 3, 4, 9):
            (tmp_path / f"{number}.png").write_bytes(b"noise")
        else:
            make_photo(tmp_path / f"{number}.png", seed=number)
    output = Kept()
    finished = run(captioner, tmp_path, output, batch_size=2)
    assert [isinstance(entry.record.result, ImageError) for entry in finished] == [
        number in (0, 3, 4, 9) for number in range(10)
    ]
    assert [[entry.source.relative[0] for entry in batch] for batch in output.batches] == [
        ["0", "1", "2"],
        ["3", "4", "5", "6"],
        ["7", "8"],
        ["9"],
    ]


def test_many_bad_photos_in_a_row_do_not_wait_for_a_good_one(captioner, tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.png").write_bytes(b"noise")
    output = Kept()
    run(captioner, tmp_path, output, batch_size=2)
    assert [len(batch) for batch in output.batches] == [8, 8, 4]


def test_photos_that_are_done_are_read_and_no_more(captioner, tmp_path):
    paths = make_photos(tmp_path, 9)
    output = Kept()
    digests = {entry.source.path: entry.digest for entry in run(captioner, tmp_path, output)}
    known = {str(path): Known(digests[str(path)]) for path in paths if path != paths[4]}
    known[str(paths[7])] = Known(b"it was another photo")
    output = Kept(known)
    finished = run(captioner, tmp_path, output, batch_size=4)
    assert {item.source.path for item in finished if isinstance(item, Done)} == {
        str(path) for path in paths if path not in (paths[4], paths[7])
    }
    written = [entry.source.path for batch in output.batches for entry in batch]
    assert written == [str(paths[4]), str(paths[7])]


def test_batches_are_the_same_however_often_a_run_is_taken_up(captioner, tmp_path):
    """So that log-probabilities are the same to the last digit."""
    make_photos(tmp_path, 14)
    (tmp_path / "000" / "00004.png").write_bytes(b"noise")
    whole = Kept()
    run(captioner, tmp_path, whole, batch_size=3)
    done = {}
    batches = []
    while len(batches) < len(whole.batches):
        output = Kept({path: Known(digest, error) for path, (digest, error) in done.items()})
        stream = caption_sources(
            find_sources([str(tmp_path)]), captioner, captioner.default_options, output, BatchSettings(batch_size=3)
        )
        for _ in stream:
            if any(output.batches):
                break
        stream.close()
        (batch,) = [batch for batch in output.batches if batch]
        done |= {entry.source.path: (entry.digest, entry.error) for entry in batch}
        batches.append(batch)
    assert [[entry.record.to_dict() for entry in batch] for batch in batches] == [
        [entry.record.to_dict() for entry in batch] for batch in whole.batches
    ]


def test_few_photos_are_read_ahead(captioner, tmp_path):
    make_photos(tmp_path, 200)
    output = Kept()
    stream = caption_sources(
        find_sources([str(tmp_path)]),
        captioner,
        captioner.default_options,
        output,
        BatchSettings(batch_size=4, readers=2),
    )
    next(stream)
    # A batch written, two in the network or before it, and a window of readers.
    assert len(output.asked) <= 4 * 3 + (4 + 2 * 2) + 1
    stream.close()


def test_a_stop_writes_what_is_in_the_network_and_no_more(captioner, tmp_path):
    make_photos(tmp_path, 50)
    output = Kept()
    run(captioner, tmp_path, output, batch_size=4, stopped=lambda: len(output.batches) >= 2)
    assert 2 <= len(output.batches) <= 4
    assert all(len(batch) == 4 for batch in output.batches)


def test_an_engine_that_fails_ends_the_run_after_what_was_done(tmp_path):
    make_photos(tmp_path, 12)
    with Captioner.load(BUNDLE, "cpu") as captioner:
        output = Kept()
        closed = threading.Event()

        def known(source):
            if source.relative.endswith("00008.png"):
                captioner.close()
                closed.set()

        output.known = known
        with pytest.raises(EngineError, match="the captioner is closed"):
            run(captioner, tmp_path, output, batch_size=1, readers=1)
    assert closed.is_set()
    assert len(output.batches) < 9


def test_settings_have_ranges():
    for name in ("batch_size", "workers"):
        with pytest.raises(OptionsError, match=f"{name} must be at least 1, not 0"):
            BatchSettings(**{name: 0})


def test_a_record_depends_on_the_bundle_every_option_and_for_errors_on_the_limits():
    key = run_key("a", "fp32", DecodeOptions(), PhotoLimits())
    assert run_key("a", "fp32", DecodeOptions(), PhotoLimits()) == key
    assert run_key("b", "fp32", DecodeOptions(), PhotoLimits()).caption != key.caption
    assert run_key("a", "int8", DecodeOptions(), PhotoLimits()).caption != key.caption
    other = {"beam_size": 2, "n_best": 2, "sample": True, "guard": False, "allow_unk": True, "banned_words": ("a",)}
    for field in dataclasses.fields(DecodeOptions):
        value = other.get(field.name, 0.5 if isinstance(field.default, float) else 7)
        needed = {"beam_size": 2} if field.name == "n_best" else {}
        changed = run_key("a", "fp32", DecodeOptions(**{**needed, field.name: value}), PhotoLimits())
        assert changed.caption != key.caption, field.name
        assert changed.error != key.error, field.name
    smaller = run_key("a", "fp32", DecodeOptions(), PhotoLimits(max_pixels=5))
    assert smaller.caption == key.caption
    assert smaller.error != key.error


def read(path, known=None, **settings):
    return PhotoReader(32, PhotoLimits(), **settings)(Job(Source(str(path), str(path)), known))


def test_reading_hashes_the_bytes_and_gives_the_networks_pixels(photos):
    plain, with_thumbnail = read(photos[0]), read(photos[0], thumbnails=True)
    assert isinstance(plain, Photo)
    assert (plain.pixels.shape, str(plain.pixels.dtype)) == ((32, 32, 3), "uint8")
    # An output with thumbnails has the same captions as one without.
    assert (plain.pixels == with_thumbnail.pixels).all()
    assert plain.thumbnail is None
    assert with_thumbnail.thumbnail.startswith(b"\xff\xd8\xff")
    assert 0 < plain.read_s < 10


def test_an_error_that_is_the_same_as_last_time_is_no_news(tmp_path):
    path = tmp_path / "missing.jpg"
    first = read(path)
    assert isinstance(first, Entry)
    assert first.digest is None
    again = read(path, Known(None, first.error))
    assert again == Done(first.source, first.error, left=False)
    make_photo(tmp_path / "missing.png", seed=1)
    (tmp_path / "missing.png").rename(path)
    assert isinstance(read(path, Known(None, first.error)), Photo)


def test_what_was_lost_is_restored_only_if_the_photo_is_as_it_was(photos):
    calls = []
    photo = read(photos[0])
    assert isinstance(read(photos[0], Known(photo.digest, restore=lambda: calls.append(1))), Done)
    assert isinstance(read(photos[0], Known(b"other", restore=lambda: calls.append(2))), Photo)
    assert calls == [1]
    failed = read(photos[0], Known(photo.digest, restore=lambda: CaptionError("no room")))
    assert str(failed.record.result) == "no room"


def test_the_exit_code_tells_whether_all_some_or_none_have_their_caption():
    for captioned, done, failed, code in (
        *((0, 0, 0, 0), (3, 0, 0, 0), (0, 3, 0, 0), (0, 0, 2, 4)),
        *((1, 0, 2, 6), (0, 1, 2, 6), (1, 1, 0, 0)),
    ):
        tally = Tally()
        tally.captioned, tally.done = captioned, done
        for _ in range(failed):
            tally.fail("a.jpg", "is bad")
        assert tally.exit_code == code


def test_the_summary_counts_kinds_of_errors():
    tally = Tally()
    tally.captioned, tally.done, tally.left = 1, 2, 3
    for number in range(5):
        path = f"{number}.jpg"
        tally.fail(path, "is cut short")
    tally.fail("two\nlines", "does not exist")
    lines = tally.lines()
    assert lines[0].startswith("captioned 1 photo in 0.0 s (")
    assert lines[0].endswith(" a second); 2 had their caption before; 3 left alone; 6 failed:")
    assert lines[1:] == [
        "  5 x is cut short: 0.jpg, 1.jpg, 2.jpg, ...",
        "  1 x does not exist: two\\nlines",
    ]


def test_the_summary_stays_short_whatever_goes_wrong():
    tally = Tally()
    for number in range(1000):
        tally.fail(f"{number}", f"is wrong in way {min(number, 19)}")
    lines = tally.lines()[1:]
    assert len(lines) == 12
    assert lines[0] == "  981 x is wrong in way 19: 19, 20, 21, ..."
    assert lines[-1] == "  9 x 9 other reasons: 10, 11, 12, ..."
    assert sum(int(line.split()[0]) for line in lines) == 1000


def test_the_summary_names_twelve_reasons_as_they_are():
    tally = Tally()
    for number in range(12):
        tally.fail("x" * 5000, f"is wrong in way {number}")
    lines = tally.lines()[1:]
    assert [line.partition(": ")[0] for line in lines] == [f"  1 x is wrong in way {number}" for number in range(12)]
    assert max(map(len, lines)) < 350


def errors_file(path, *errors, replace=False):
    ErrorsFile.check(path, replace=replace)
    file = ErrorsFile(path)
    for name, message in errors:
        file.add(name, json.dumps({"class": "ImageError", "reason": "is bad", "message": message}))
    file.close()


def test_the_file_of_errors(tmp_path):
    path = tmp_path / "errors.jsonl"
    errors_file(path, ("a\udcff", "it is bad"))
    assert json.loads(path.read_text()) == {
        "path": "a\udcff",
        "class": "ImageError",
        "reason": "is bad",
        "message": "it is bad",
    }
    errors_file(path, ("b", "bad"), ("c", "bad"))
    assert [json.loads(line)["path"] for line in path.read_text().splitlines()] == ["b", "c"]
    errors_file(path)
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["errors.jsonl"]


def test_the_file_of_errors_replaces_nothing_else(tmp_path):
    path = tmp_path / "notes.txt"
    for content in ("my notes\n", '{"path": "a"}\n', "[1]\n", "7\n"):
        path.write_text(content)
        with pytest.raises(OptionsError, match="holds something else than errors: choose another file for --errors"):
            errors_file(path)
        assert path.read_text() == content
    errors_file(path, replace=True)
    with pytest.raises(OptionsError, match=r"the folder of .* does not exist"):
        errors_file(tmp_path / "none" / "errors")
    with pytest.raises(OptionsError, match="is a folder"):
        errors_file(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
