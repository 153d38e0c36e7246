"""One fetch over http(s), for `caption_rt.fetch`."""

import http.client
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from typing import IO

from caption_rt._amounts import byte_count, byte_counts
from caption_rt._sniff import SNIFFED_BYTES, other_kind, photo_kind
from caption_rt.errors import ImageError, Parameter, printable, shown
from caption_rt.fetch import is_address

__all__ = ["Fetch", "file_path", "web_opener"]

_CHUNK = 64 * 1024


def web_opener(redirects: urllib.request.HTTPRedirectHandler) -> urllib.request.OpenerDirector:
    """What opens http and https addresses, through a proxy where the system has one.

    It is not urllib's usual opener, which also opens files and speaks FTP.

    Args:
        redirects: decides which redirections are followed.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        redirects,
    ):
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirections from http(s) to http(s), ten at most."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if not is_address(newurl):  # urllib itself would go on to ftp
            raise urllib.error.HTTPError(newurl, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@dataclass
class Fetch:
    """One fetch, run by a thread of its own."""

    address: str
    max_bytes: int
    timeout_s: float
    data: bytes | None = None
    error: ImageError | None = None

    def run(self) -> None:
        """Fetch, and put the outcome where the waiting thread finds it."""
        try:
            self.data = self._fetched()
        except ImageError as exc:
            self.error = exc
        except Exception as exc:
            self.error = self._error(exc)
            self.error.__cause__ = exc

    def too_slow(self) -> ImageError:
        """The error of a fetch that took longer than it may."""
        return self._says(
            f"did not arrive within {self.timeout_s:g} seconds: try again, or fetch it with a browser",
            reason="did not arrive in time",
        )

    def _fetched(self) -> bytes:
        from caption_rt import __version__

        deadline = time.monotonic() + self.timeout_s
        headers = {"User-Agent": f"caption-rt/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
        request = urllib.request.Request(_escaped(self.address), headers=headers)
        with web_opener(_Redirects()).open(request, timeout=self.timeout_s) as response:
            return self._received(response, deadline)

    def _received(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        stated = response.headers.get("Content-Length", "")
        length = int(stated) if stated.isdecimal() else None
        if length is not None and length > self.max_bytes:
            raise self._too_large(length)
        data, looked_at = bytearray(), False
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > self.max_bytes:
                raise self._too_large(None)
            if time.monotonic() > deadline:
                raise self.too_slow()
            if not looked_at and len(data) >= SNIFFED_BYTES:
                self._look_at(bytes(data), response)
                looked_at = True
        if length is not None and len(data) < length:
            raise self._says(f"broke off after {len(data)} of {length} bytes: try again", reason="broke off")
        if not data:
            raise self._says("holds nothing (0 bytes): check the address", reason="is empty")
        self._look_at(bytes(data), response)
        return bytes(data)

    def _look_at(self, data: bytes, response: http.client.HTTPResponse) -> None:
        if photo_kind(data) is None:
            what = other_kind(data)
            called = printable(response.headers.get("Content-Type", "nothing"))
            detail = "" if what else f" (its server calls it {called})"
            what = what or "no photo"
            remedy = "give the address of the image file itself"
            raise self._says(f"holds {what}{detail}: {remedy}", reason=f"holds {what}")

    def _error(self, exc: Exception) -> ImageError:
        """The sentence of anything that goes wrong on the way."""
        if isinstance(exc, urllib.error.HTTPError):
            with exc:
                return self._refused(exc)
        if isinstance(exc, urllib.error.URLError) and isinstance(exc.reason, Exception):
            exc = exc.reason
        host = self._host()
        match exc:
            case TimeoutError():
                return self.too_slow()
            case ssl.SSLCertVerificationError():
                return self._says(
                    f"is not fetched: the certificate of {host} is not valid ({exc.verify_message})",
                    reason="has a server whose certificate is not valid",
                )
            case ssl.SSLError():
                return self._says(
                    f"cannot be fetched: no secure connection to {host} ({exc.reason or exc})",
                    reason="cannot be fetched: no secure connection",
                )
            case http.client.InvalidURL() | ValueError():
                return self._says(f"is not a valid address ({printable(exc)})", reason="is not a valid address")
            case http.client.HTTPException():
                return self._says(
                    f"cannot be fetched: {host} does not answer as a web server does",
                    reason="cannot be fetched: no answer of a web server",
                )
            case OSError():
                why = printable(exc.strerror or exc)
                return self._says(
                    f"cannot be fetched from {host} ({why}): check the address and the network",
                    reason=f"cannot be fetched: {why}",
                )
        return self._says(f"cannot be fetched ({printable(exc)})", reason="cannot be fetched")

    def _host(self) -> str:
        try:
            return printable(urllib.parse.urlsplit(self.address).hostname or "its host")
        except ValueError:
            return "its host"

    def _refused(self, exc: urllib.error.HTTPError) -> ImageError:
        if not is_address(exc.url):
            return self._says(
                f"leads to {printable(exc.url)}, and only http and https addresses are fetched",
                reason="leads to an address that is neither http nor https",
            )
        if str(exc.msg).startswith(_Redirects.inf_msg):
            return self._says(
                "leads from one address to the next without end: check the address",
                reason="leads from one address to the next without end",
            )
        answer = f"cannot be fetched: the server answers {exc.code} {printable(exc.msg)}".rstrip()
        if exc.code in (401, 403, 407):
            remedy = "save it as a file first, by a program that may see it"
        else:
            remedy = "check the address" if exc.code < 500 and exc.code != 429 else "try again later"
        return self._says(f"{answer}: {remedy}", reason=answer)

    def _too_large(self, length: int | None) -> ImageError:
        stated = f"is larger than {byte_count(self.max_bytes)}"
        if length is not None:
            stated = "is a file of {}, and the limit is {}".format(*byte_counts(length, self.max_bytes))
        return self._says(f"{stated}: scale it down, or raise ", Parameter("max_bytes"), reason="is too large a file")

    def _says(self, *sentence: str, reason: str) -> ImageError:
        return ImageError(f"{shown(self.address)} ", *sentence, reason=reason)


def _escaped(address: str) -> str:
    """An address as HTTP takes it: people copy those with letters of every language in them.

    Raises:
        ValueError: it has no host, or an impossible one.
    """
    parts = urllib.parse.urlsplit(address)
    if not is_address(address) or not parts.hostname:
        raise ValueError("it names no host")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    path, query = (urllib.parse.quote(part, safe="/%:=&?~+!$,;'@()*[]") for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def file_path(address: str) -> str:
    """The path of a file:// address (RFC 8089).

    Raises:
        ImageError: it is on another machine.
    """
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:
        parts = urllib.parse.SplitResult("file", "?", "", "", "")
    if parts.netloc.lower() not in ("", "localhost"):
        raise ImageError(
            f"{shown(address)} names a file of another machine: a path here is file:///path",
            reason="names a file of another machine",
        )
    if os.name == "nt":
        return urllib.request.url2pathname(parts.path)
    return os.fsdecode(urllib.parse.unquote_to_bytes(parts.path))
