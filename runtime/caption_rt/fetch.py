"""Fetching a photo from an http(s) address. The command line does so; the library itself never opens the network."""

import threading

__all__ = ["fetch_photo", "is_address"]


def is_address(text: str) -> bool:
    """Whether a text is an http(s) address rather than a path."""
    return text[:8].lower().startswith(("http://", "https://"))


def fetch_photo(address: str, *, max_bytes: int, timeout_s: float = 30.0) -> bytes:
    """Fetch the file of a photo.

    Only http and https are spoken, after a redirection as well, through a proxy where the environment names one. What
    the server calls the content is not believed: its first bytes decide, and what is no photo is not fetched further.

    Args:
        address: an http(s) address.
        max_bytes: the largest file that is fetched, in bytes.
        timeout_s: the time that all of it may take, in seconds.

    Returns:
        The bytes of an image file; `caption_rt.image.read_photo` takes them. They may still be damaged.

    Raises:
        ImageError: the address is wrong or cannot be reached, the server refuses, or it sends no photo, too large a
            one, or sends it too slowly.
    """
    from caption_rt._http import Fetch  # urllib and TLS, which take a while to import

    fetch = Fetch(address, max_bytes, timeout_s)
    # In a thread, because neither the search for a host nor a header that comes letter by letter can be cut short.
    thread = threading.Thread(target=fetch.run, name="caption-rt fetch", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if fetch.error is not None:
        raise fetch.error
    if fetch.data is None:
        raise fetch.too_slow()
    return fetch.data
