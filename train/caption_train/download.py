"""Large files over http(s), fetched in as many pieces as it takes.

What has arrived lies in ``NAME.part``, and ``NAME.part.json`` says of which file it is the beginning. The next call
asks for the rest alone (RFC 9110, section 14: Range and If-Range); a server that cannot do that sends the whole again.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from pathlib import Path
from typing import IO, Any

from caption_rt import __version__
from caption_rt._http import web_opener
from caption_rt.errors import printable
from caption_train.errors import DatasetError
from caption_train.files import read_json, write_json

logger = logging.getLogger(__name__)

_CHUNK = 2**20
_TIMEOUT_S = 60.0
_ATTEMPTS = 4  # without a byte of progress between them


def part_of(target: Path) -> Path:
    """Where a file lies that has not arrived whole."""
    return target.with_name(f"{target.name}.part")


def arrived(address: str, target: Path) -> int:
    """How many bytes of the file of an address lie in `part_of` its target; what came from elsewhere does not count."""
    part = part_of(target)
    return part.stat().st_size if part.exists() and _known(target).get("address") == address else 0


def download(
    address: str,
    target: Path,
    *,
    expected_bytes: int | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Path:
    """Fetch a file into ``NAME.part``, or the rest of it; what breaks off is taken up again.

    Args:
        address: An http(s) address.
        target: What the file is to be called once its content has been checked; nothing is written there.
        expected_bytes: Its size; a server that has another is not asked for it.
        on_bytes: Called with the number of bytes that have just arrived; negative where what was there is thrown away.

    Returns:
        The whole file, under the name of `part_of`.

    Raises:
        DatasetError: The address is wrong or cannot be reached, the server refuses or has a file of another size, or
            the disk is full.
    """
    failures = 0
    while True:
        held = arrived(address, target)
        try:
            _fetch_rest(address, target, expected_bytes, on_bytes)
            return part_of(target)
        except DatasetError:
            raise
        except _TRANSIENT as exc:
            failures = 0 if arrived(address, target) > held else failures + 1
            if _is_final(exc) or failures >= _ATTEMPTS:
                raise DatasetError(f"{printable(address)} {_trouble(exc, address)}") from exc
            logger.warning("%s %s; trying again", printable(address), _trouble(exc, address))
            time.sleep(min(2.0**failures, 30.0))


def size_at(address: str) -> int | None:
    """The size in bytes that a server states of a file; None where it does not answer or state one."""
    try:
        with _open(address, {}, method="HEAD") as response:
            return _number(response.headers.get("Content-Length"))
    except DatasetError:
        raise
    except _TRANSIENT as exc:
        logger.info("%s %s", printable(address), _trouble(exc, address))
        return None


def _fetch_rest(address: str, target: Path, expected_bytes: int | None, on_bytes: Callable[[int], None]) -> None:
    """One request: the rest, or the whole where there is nothing that it would be the rest of."""
    part, held, known = part_of(target), arrived(address, target), _known(target)
    if held and held == known.get("bytes"):
        return
    headers = {"Range": f"bytes={held}-"} if held else {}
    if held and known.get("validator"):
        headers["If-Range"] = str(known["validator"])
    try:
        response = _open(address, headers)
    except urllib.error.HTTPError as exc:
        if exc.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not held:
            raise
        exc.close()
        on_bytes(-held)
        part.unlink()
        raise _Broken("has changed on the server", "begin again") from exc
    with response:
        start, total = _extent(response, address)
        if start not in (0, held):
            raise _Broken("does not come from where it broke off", "try again")
        if held and not start:
            logger.info("%s: the server sends it from the beginning", printable(address))
            on_bytes(-held)
        if expected_bytes is not None and total is not None and total != expected_bytes:
            raise DatasetError(
                f"{printable(address)} has {total:,} bytes on the server, and {expected_bytes:,} are expected: "
                "look whether the address is right"
            )
        if total is None:  # only what is known of the file tells a connection that broke off from the end
            total = expected_bytes
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                _note_of(target), {"address": address, "validator": _validator(response.headers), "bytes": total}
            )
            with part.open("r+b" if part.exists() else "wb") as file:
                file.truncate(start)
                file.seek(start)
                lost = _receive(response, file, on_bytes)
        except OSError as exc:
            raise DatasetError(
                f"{part} cannot be written ({exc.strerror or exc}): make room, and give the same command again to go on"
            ) from exc
    if lost is not None:
        raise lost
    size = part.stat().st_size
    if total is not None and size < total:
        raise _Broken(f"broke off after {size:,} of {total:,} bytes", "try again")


class _Broken(Exception):
    """What came is not whole, though nothing failed."""


_TRANSIENT = (OSError, http.client.HTTPException, ValueError, _Broken)


def _receive(response: http.client.HTTPResponse, file: IO[bytes], on_bytes: Callable[[int], None]) -> Exception | None:
    """Write what comes, to the disk; the network's trouble is returned, as the disk's comes as OSError as well."""
    lost = None
    while True:
        try:
            chunk = response.read1(_CHUNK)
        except _TRANSIENT as exc:
            lost = exc
            break
        if not chunk:
            break
        file.write(chunk)
        on_bytes(len(chunk))
    file.flush()
    os.fsync(file.fileno())
    return lost


def _note_of(target: Path) -> Path:
    return part_of(target).with_suffix(".part.json")


def _known(target: Path) -> Mapping[str, Any]:
    with contextlib.suppress(Exception):  # without it, the whole is fetched again
        return read_json(_note_of(target))
    return {}


def _validator(headers: Message) -> str | None:
    """What tells one state of a file from another; a weak ETag does not (RFC 9110, section 13.1.5)."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _extent(response: http.client.HTTPResponse, address: str) -> tuple[int, int | None]:
    """Where what a server sends begins, and the size of the whole."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0, _number(response.headers.get("Content-Length"))
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None:
        raise DatasetError(f"{printable(address)}: the server sends a part without saying which")
    return int(found[1]), _number(found[2])


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirections from http(s) to http(s) alone."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _open(address: str, headers: Mapping[str, str], method: str = "GET") -> http.client.HTTPResponse:
    _check_address(address)
    known = {"User-Agent": f"caption-rt/{__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(address, headers=known | dict(headers), method=method)
    response: http.client.HTTPResponse = web_opener(_Redirects()).open(request, timeout=_TIMEOUT_S)
    return response


def _check_address(address: str) -> None:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DatasetError(f"{printable(address)} is no http or https address")


def _is_final(exc: Exception) -> bool:
    """Whether asking again would give the same."""
    if isinstance(exc, urllib.error.HTTPError):
        return exc.code < 500 and exc.code not in (408, 429)
    reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
    return isinstance(reason, ssl.SSLError | ValueError | http.client.InvalidURL) and not isinstance(
        reason, TimeoutError
    )


def _trouble(exc: Exception, address: str) -> str:
    """What went wrong, in words that follow the address."""
    host = urllib.parse.urlsplit(address).hostname
    if isinstance(exc, _Broken):
        return ": ".join(exc.args)
    if isinstance(exc, urllib.error.HTTPError):
        return f"cannot be fetched: the server answers {exc.code} {printable(exc.msg)}".rstrip()
    reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
    if isinstance(reason, TimeoutError):
        return f"cannot be fetched: {host} does not answer in time"
    if isinstance(reason, OSError):
        why = printable(reason.strerror or reason)
        return f"cannot be fetched from {host} ({why}): check the address and the network"
    return f"cannot be fetched: {host} does not answer as a web server does ({printable(reason)})"
