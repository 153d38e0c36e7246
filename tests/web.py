"""A web server on this machine that has files, knows Range, and can behave as badly as servers do."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Files by path; the attributes say how it behaves, and keep what it was asked."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        """Start in a thread of its own."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.ranges = True
        """Whether a Range is honoured."""
        self.lengths = True
        """Whether a Content-Length is stated."""
        self.etag: str | None = '"v1"'
        self.drip: float | None = None
        """Seconds between pieces of 4 KiB; None sends at once."""
        self.break_after: list[int] = []
        """After how many bytes to hang up, one for each request that comes."""
        self.failures: list[int] = []
        """Codes to answer with first."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and Range of each request."""
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def asked(self) -> list[str | None]:
        """The Range of each GET."""
        return [range_ for method, _, range_ in self.requests if method == "GET"]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed hangs up."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append((self.command, self.path, wanted))
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        data = server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start, size = 0, len(data)
        valid = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.ranges and valid:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= size:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        if server.lengths:
            self.send_header("Content-Length", str(size - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if body:
            self._send(data[start:])

    def _send(self, data: bytes) -> None:
        server = self.server
        if server.break_after:
            data = data[: server.break_after.pop(0)]
            self.close_connection = True
        if server.drip is None:
            self.wfile.write(data)
            return
        for first in range(0, len(data), 4096):
            self.wfile.write(data[first : first + 4096])
            self.wfile.flush()
            time.sleep(server.drip)
