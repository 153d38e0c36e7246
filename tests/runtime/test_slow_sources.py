"""Photos that are slow to come: what is finished is written meanwhile, and the output is the same in the end."""

import http.server
import os
import subprocess
import sys
import threading
import time

import pytest

from caption_rt.batch import BatchSettings, caption_sources
from caption_rt.captioner import Captioner
from caption_rt.errors import OptionsError
from caption_rt.outputs import StreamOutput
from caption_rt.pipeline import Feed
from caption_rt.sources import Source, find_sources
from running import BUNDLE, caption_rt, make_photos, started

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")


def until(condition, seconds=20):
    """Wait until something has happened."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


@pytest.fixture
def slow_server(photos):
    """A web server that sends a photo only when it is allowed to; its address, whether it was asked, and the leave."""
    asked, allowed = threading.Event(), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            allowed.wait(30)
            data = photos[0].read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/photo.jpg", asked, allowed
        allowed.set()
        server.shutdown()
        thread.join()


def lines(path):
    return path.read_bytes().splitlines() if path.exists() else []


def test_a_slow_address_delays_no_line_before_it(tmp_path, slow_server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address, asked, allowed = slow_server
    photos = make_photos(tmp_path / "photos", 9)
    out = tmp_path / "out.jsonl"
    command = [*photos[:4], address, *photos[4:], "--batch-size", "2", "-o"]
    process = started(*command, out, env=os.environ | {"no_proxy": "127.0.0.1"})
    until(asked.is_set)
    # Both batches of the four photos before it, while it has not come.
    until(lambda: len(lines(out)) == 4)
    assert process.poll() is None
    allowed.set()
    process.communicate(timeout=30)
    assert process.returncode == 0
    # All there at once: the same bytes.
    other = tmp_path / "other.jsonl"
    assert caption_rt(*command, other, env=os.environ | {"no_proxy": "127.0.0.1"}).returncode == 0
    assert out.read_bytes() == other.read_bytes()
    assert len(lines(out)) == 10


def test_a_list_that_grows_slowly_delays_no_line(tmp_path):
    photos = make_photos(tmp_path / "photos", 5)
    out = tmp_path / "out.jsonl"
    process = started("-", "--batch-size", "2", "-o", out, stdin=subprocess.PIPE)
    for count, (photo, written) in enumerate(zip(photos, (0, 2, 2, 4, 4), strict=True), 1):
        process.stdin.write(f"{photo}\n")
        process.stdin.flush()
        until(lambda written=written: len(lines(out)) == written)
        assert process.poll() is None, count
    process.communicate(timeout=30)
    assert process.returncode == 0
    other = tmp_path / "other.jsonl"
    assert caption_rt(*photos, "--batch-size", "2", "-o", other).returncode == 0
    assert out.read_bytes() == other.read_bytes()


def test_with_batches_of_one_each_caption_comes_at_once(tmp_path):
    photos = make_photos(tmp_path / "photos", 3)
    process = started("-", "--batch-size", "1", stdin=subprocess.PIPE)
    for photo in photos:
        process.stdin.write(f"{photo}\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(f"{photo}\t")
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def captioner():
    with Captioner.load(BUNDLE, "cpu") as loaded:
        yield loaded


def test_reading_goes_on_while_a_photo_is_waited_for(captioner, tmp_path):
    """The feed is slow, and the photos before are read, captioned and written meanwhile; the caller sees each."""
    make_photos(tmp_path, 5)
    leave = threading.Event()
    written = []

    def slow():
        for number, source in enumerate(find_sources([str(tmp_path)])):
            if number == 4:
                leave.wait(20)
            yield source

    output = StreamOutput(b"", lambda entry: entry.source.relative.encode(), written.append)
    settings = BatchSettings(batch_size=2, readers=1)
    finished = caption_sources(slow(), captioner, captioner.default_options, output, settings)
    for _ in range(4):
        next(finished)
    assert len(written) == 4
    assert not leave.is_set()
    leave.set()
    assert len(list(finished)) == 1


def test_what_is_wrong_with_a_list_is_said_after_the_photos_before(captioner, tmp_path):
    make_photos(tmp_path, 3)

    def wrong():
        yield from find_sources([str(tmp_path)])
        raise OptionsError("it is no list")

    written = []
    output = StreamOutput(b"", lambda entry: b"x", written.append)
    with pytest.raises(OptionsError, match="it is no list"):
        list(caption_sources(wrong(), captioner, captioner.default_options, output, BatchSettings()))
    assert len(written) == 3


def test_a_run_that_ends_waits_for_no_photo_that_never_comes(captioner, tmp_path):
    """An iterable that waits for ever, and an engine that fails, or a caller who has enough."""
    (photo,) = make_photos(tmp_path, 1)
    never = threading.Event()

    def endless():
        yield Source(str(photo), photo.name)
        never.wait(60)

    output = StreamOutput(b"", lambda entry: b"x", lambda data: None)
    start = time.monotonic()
    finished = caption_sources(
        endless(), captioner, captioner.default_options, output, BatchSettings(batch_size=1, readers=1)
    )
    assert next(finished).source.path == str(photo)
    finished.close()
    assert time.monotonic() - start < 10
    never.set()


def test_a_feed_holds_few_items_and_gives_all():
    bell = threading.Event()
    asked = []

    def items():
        for number in range(100):
            asked.append(number)
            yield number

    with Feed(items(), bell, room=3) as feed:
        until(lambda: len(asked) >= 4)
        time.sleep(0.02)
        assert len(asked) <= 5
        found = []
        while not feed.ended:
            bell.clear()
            item = feed.take()
            if item is None:
                bell.wait(1)
            else:
                found.append(item)
    assert found == list(range(100))
    assert feed.error is None
