"""Work done ahead: a function applied in threads to what comes, with its results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], *, threads: int, window: int) -> Generator[R, None, None]:
    """Apply a function to items in threads, and yield its results in the order of the items.

    Items are taken from their iterable in the caller's thread, as there is room: at most `window` of them are in work
    or finished and not yet yielded, so memory does not grow with their number. When the iterator is closed, or the
    function raises, no further item is begun.

    Args:
        function: called with each item, in any of the threads.
        items: may be without end.
        threads: how many items are in work at once, at least 1.
        window: how many results are held, at least 1.
    """
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="caption-rt")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            while pending and (len(pending) >= window or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
