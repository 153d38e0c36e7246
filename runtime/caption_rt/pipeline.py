"""Work done ahead: a function applied in threads to what comes, with its results in order."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Feed", "Stage", "ahead"]

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


class Feed(Generic[T]):
    """Takes items from an iterable in a thread of its own, so that nobody waits for one that is slow to come.

    Leave it by `close`, or as a context manager. The thread is a daemon: an iterable that waits for something that
    never comes keeps no process from ending.
    """

    def __init__(self, items: Iterable[T], bell: threading.Event, *, room: int) -> None:
        """Begin to take items.

        Args:
            items: may be without end.
            bell: set whenever an item has come, and at the end.
            room: how many items are held, at least 1.
        """
        self._items = items
        self._bell = bell
        self._room = threading.Semaphore(room)
        self._held: deque[T] = deque()
        self.error: BaseException | None = None
        """What the iterable raised; the items before it are given all the same."""
        self._at_end = self._closed = False
        threading.Thread(target=self._run, name="caption-rt feed", daemon=True).start()

    def __enter__(self) -> "Feed[T]":
        """The feed itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def ended(self) -> bool:
        """Whether all items have been taken from the feed."""
        return self._at_end and not self._held

    def take(self) -> T | None:
        """The next item; None if there is none now."""
        if not self._held:
            return None
        self._room.release()
        return self._held.popleft()

    def close(self) -> None:
        """Take no further items."""
        self._closed = True
        self._room.release()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._held.append(item)
                self._bell.set()
                self._room.acquire()
                if self._closed:
                    return
        except BaseException as exc:  # for whoever takes the items
            self.error = exc
        finally:
            self._at_end = True
            self._bell.set()


class Stage(Generic[T, R]):
    """Applies a function in threads, and gives its results in order, without ever waiting."""

    def __init__(self, function: Callable[[T], R], bell: threading.Event, *, threads: int, window: int) -> None:
        """Prepare the threads.

        Args:
            function: called with each item, in any of the threads.
            bell: set whenever a result is there.
            threads: how many items are in work at once, at least 1.
            window: how many items are in work, or finished and not yet taken, at least 1.
        """
        self._function = function
        self._bell = bell
        self._window = window
        self._pending: deque[Future[R]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="caption-rt")

    def __enter__(self) -> "Stage[T, R]":
        """The stage itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Begin nothing further, and wait for what is in work."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def has_room(self) -> bool:
        """Whether another item may be put."""
        return len(self._pending) < self._window

    @property
    def is_empty(self) -> bool:
        """Whether every result has been taken."""
        return not self._pending

    @property
    def is_ready(self) -> bool:
        """Whether `take` gives a result, or raises what the function raised."""
        return bool(self._pending) and self._pending[0].done()

    def put(self, item: T) -> None:
        """Have an item worked on."""
        future = self._pool.submit(self._function, item)
        self._pending.append(future)
        future.add_done_callback(lambda _: self._bell.set())

    def take(self) -> R:
        """The next result in the order of the items; waits if it is not ready."""
        return self._pending.popleft().result()
