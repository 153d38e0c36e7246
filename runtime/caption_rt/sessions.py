"""The engine of a bundle, shared by the captioners of a process, and its decoder graph as a `Stepper`."""

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from caption_rt.bundle import Bundle
from caption_rt.engine import Engine
from caption_rt.search import Rows, Step

__all__ = ["EngineStepper", "shared_engine"]

# Sessions that nobody uses any more are gone: only captioners hold them.
_engines: weakref.WeakValueDictionary[tuple[object, ...], Engine] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def shared_engine(bundle: Bundle, device: str, intra_op_threads: int | None, precision: str | None) -> Engine:
    """The engine of a bundle's content in this process: the one that is there already, or a new one.

    Args:
        bundle: the bundle; two with the same manifest have the same content.
        device: see `Engine`.
        intra_op_threads: see `Engine`.
        precision: see `Engine`.

    Raises:
        OptionsError: see `Engine`.
        BundleError: see `Engine`.
        EngineError: see `Engine`.
    """
    wanted = bundle.sha256, device, intra_op_threads, precision
    with _lock:
        engine = _engines.get(wanted)
        if engine is None:
            engine = _engines[wanted] = Engine(bundle, device, intra_op_threads, precision)
        return engine


def _leave_behind() -> None:
    """After a fork, in the child: forget the parent's sessions, whose threads the child does not have.

    Their destructor would wait for these threads for ever, so they must not be destroyed.
    """
    global _lock
    _lock = threading.Lock()
    for engine in list(_engines.values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
    _engines.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_behind)


class EngineStepper:
    """Photos that have gone through extractor and encoder; see `caption_rt.search.Stepper`."""

    def __init__(self, engine: Engine, pixels: Sequence[NDArray[np.uint8]]) -> None:
        """Run the extractor and the encoder.

        Args:
            engine: the graphs.
            pixels: uint8 [S, S, 3] of each photo.

        Raises:
            EngineError: ONNX Runtime fails.
        """
        self._engine = engine
        start = time.perf_counter()
        grid = engine.extract(np.stack(pixels))
        extracted = time.perf_counter()
        self._encoded = engine.encode(grid)
        self.extract_s = extracted - start
        self.encode_s = time.perf_counter() - extracted
        self._images = np.arange(len(pixels))
        self._rows = self._encoded.features, self._encoded.keys

    @property
    def provider(self) -> str:
        """The execution provider that is used."""
        return self._engine.provider

    @property
    def precision(self) -> str:
        """What the graphs are computed in."""
        return self._engine.precision

    @property
    def batch_size(self) -> int:
        """The number of photos."""
        return len(self._encoded.features)

    def initial_state(self) -> Rows:
        """float32 [n, U]."""
        return self._encoded.initial_state

    def step(self, tokens: NDArray[np.int64], state: Rows, images: NDArray[np.int64]) -> Step:
        """One word further; see `caption_rt.search.Stepper.step`."""
        # Megabytes a batch: copied when a photo leaves or a beam widens, not at every word.
        if not np.array_equal(images, self._images):
            self._images = images
            self._rows = self._encoded.features[images], self._encoded.keys[images]
        return Step(*self._engine.decode(tokens, state, *self._rows))
