"""Fetching a photo: a real server on this machine, which behaves as badly as servers do."""

import os
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import caption_rt
from caption_rt.errors import ImageError
from caption_rt.fetch import fetch_photo, is_address
from caption_rt.image import open_photo

LIMIT = 2**20


class Server(ThreadingHTTPServer):
    """Answers by path, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, photo):
        super().__init__(("127.0.0.1", 0), Handler)
        self.photo = photo
        self.asked = []
        self.sent = 0
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is what is being tested here."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        getattr(self, "get" + re.sub(r"\W", "_", self.path.partition("?")[0]), self.missing)()

    def answer(self, data, kind="image/jpeg", code=200, **headers):
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": len(data)} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def missing(self):
        self.send_error(404)

    def get_photo_jpg(self):
        self.answer(self.server.photo)

    def get_mislabelled(self):
        self.answer(self.server.photo, "text/plain")

    def get_caf_C3_A9(self):
        self.answer(self.server.photo)

    def get_page(self):
        self.answer(b"<!DOCTYPE html><html><body>a gallery</body></html>", "image/jpeg")

    def get_noise(self):
        self.answer(bytes(range(256)) * 3, "application/octet-stream")

    def get_nothing(self):
        self.answer(b"")

    def get_short(self):
        self.answer(self.server.photo[:3000], Content_Length=len(self.server.photo))

    def get_stated_large(self):
        self.answer(self.server.photo, Content_Length=LIMIT + 1)

    def get_endless(self, start=None):
        self.answer(self.server.photo[:2000] if start is None else start, Content_Length=None)
        while True:
            self.server.sent += self.wfile.write(bytes(2**16))

    def get_endless_page(self):
        self.get_endless(b"<html>" + b" " * 2000)

    def get_drip(self):
        self.answer(self.server.photo[:2000], Content_Length=10**6)
        while True:
            self.wfile.write(b"x")
            time.sleep(0.02)

    def get_drip_header(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while True:
            self.wfile.write(b"x")
            time.sleep(0.02)

    def get_hang(self):
        time.sleep(3)

    def get_moved(self):
        self.answer(b"", code=302, Location="/photo.jpg")

    def get_circle(self):
        self.answer(b"", code=301, Location="/circle")

    def get_to_file(self):
        self.answer(b"", code=302, Location="file:///etc/passwd")

    def get_to_ftp(self):
        self.answer(b"", code=302, Location="ftp://127.0.0.1/photo.jpg")

    def get_nowhere(self):
        self.answer(b"", code=302)

    def get_not_http(self):
        self.wfile.write(b"220 mail ready\r\n")

    def get_denied(self):
        self.send_error(403)


@pytest.fixture(scope="module")
def server(photos):
    with Server(photos[0].read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def sentence(address, **options):
    with pytest.raises(ImageError) as caught:
        fetch_photo(address, **{"max_bytes": LIMIT, "timeout_s": 5.0} | options)
    text = str(caught.value)
    assert text.startswith(f"{address} ")
    assert "\n" not in text
    return text.removeprefix(f"{address} ")


def test_an_address_is_told_from_a_path():
    assert all(is_address(text) for text in ("http://a/b.jpg", "https://a", "HTTPS://A/B.JPG"))
    assert not any(is_address(text) for text in ("photo.jpg", "http:/x", "file:///x", "ftp://a", "", "xhttp://a"))


def test_a_photo_is_fetched_byte_for_byte(server, photos):
    data = fetch_photo(f"{server.address}/photo.jpg", max_bytes=LIMIT)
    assert data == photos[0].read_bytes()
    assert open_photo(data).size == (512, 512)
    _, headers = server.asked[-1]
    assert headers["User-Agent"] == f"caption-rt/{caption_rt.__version__}"


def test_the_bytes_decide_and_not_what_the_server_calls_them(server):
    assert fetch_photo(f"{server.address}/mislabelled", max_bytes=LIMIT) == server.photo
    assert "holds an HTML page: give the address of the image file itself" in sentence(f"{server.address}/page")
    assert "no photo (its server calls it application/octet-stream)" in sentence(f"{server.address}/noise")


def test_redirections_are_followed_to_http_alone(server):
    assert fetch_photo(f"{server.address}/moved", max_bytes=LIMIT) == server.photo
    assert "leads to file:///etc/passwd, and only http" in sentence(f"{server.address}/to/file")
    assert "leads to ftp://127.0.0.1/photo.jpg, and only http" in sentence(f"{server.address}/to/ftp")
    assert "leads from one address to the next without end" in sentence(f"{server.address}/circle")
    assert "answers 302 Found" in sentence(f"{server.address}/nowhere")


def test_letters_of_every_language_are_escaped(server):
    assert fetch_photo(f"{server.address}/café?breite=100 %25#top", max_bytes=LIMIT) == server.photo
    assert server.asked[-1][0] == "/caf%C3%A9?breite=100%20%25"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.jpg", "cannot be fetched: the server answers 404 Not Found: check the address"),
        ("denied", "cannot be fetched: the server answers 403 Forbidden: save it as a file first, by a program that"),
        ("nothing", "holds nothing (0 bytes)"),
        ("short", "broke off after 3000 of 53177 bytes: try again"),
        (
            "stated/large",
            "is a file of 1048577 bytes, and the limit is 1048576 bytes: scale it down, or raise max_bytes",
        ),
        ("not/http", "127.0.0.1 does not answer as a web server does"),
    ],
)
def test_what_goes_wrong_is_one_sentence(server, path, expected):
    assert expected in sentence(f"{server.address}/{path}")


def test_a_body_without_end_is_left_at_the_limit(server):
    server.sent = 0
    assert "is larger than 1.0 MiB: scale it down, or raise max_bytes" in sentence(f"{server.address}/endless")
    time.sleep(0.05)
    assert server.sent < 16 * LIMIT  # what was on its way when the client hung up


def test_what_is_no_photo_is_not_fetched_further(server):
    assert "holds an HTML page" in sentence(f"{server.address}/endless/page", max_bytes=2**40)


@pytest.mark.parametrize("path", ["drip", "drip/header", "hang"])
def test_the_time_limit_is_for_the_whole_fetch(server, path):
    start = time.monotonic()
    assert "did not arrive within 0.3 seconds" in sentence(f"{server.address}/{path}", timeout_s=0.3)
    assert time.monotonic() - start < 2


def test_an_address_that_cannot_be_reached():
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        said = sentence(f"http://127.0.0.1:{closed.getsockname()[1]}/a.jpg")
    assert said.startswith("cannot be fetched from 127.0.0.1 (Connection refused): check the address")


def test_a_host_that_does_not_exist(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # no test asks a name server
    assert sentence("http://no.such.host/a.jpg").startswith("cannot be fetched from no.such.host (Name or service")


def test_a_server_that_speaks_no_tls(server):
    address = server.address.replace("http:", "https:")
    assert "cannot be fetched: no secure connection to 127.0.0.1" in sentence(f"{address}/photo.jpg")


@pytest.mark.parametrize(
    "address", ["http://", "http:///a.jpg", "http://a:b/c.jpg", "http://[::1/a.jpg", "https://" + "ü" * 70 + "/a.jpg"]
)
def test_an_address_that_is_none(address):
    assert "is not a valid address" in sentence(address)
