"""Tensors that stay on the device from graph to graph, by ONNX Runtime's bindings of inputs and outputs.

The log-probabilities and the attention of a word are a few kilobytes and are wanted on the host. The grid, the
features, the keys and the state are megabytes, and only the next graph wants them: on a GPU they are not copied up and
down for each word. Nothing here imports onnxruntime; its sessions and values come from `caption_rt.engine`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from caption_rt._handmade import DATA, PICKED, ROWS
from caption_rt.devices import Device
from caption_rt.errors import EngineError, printable

__all__ = ["Decoded", "DeviceRows", "Encoded", "Gather", "Rows", "engine_errors", "padded", "run_bound"]


class DeviceRows:
    """float32 rows [n, ...] that lie on an engine's device, such as the features of n photos.

    They are picked with an array of row numbers as a NumPy array is, which makes a copy on the device.
    """

    def __init__(self, value: Any, gather: "Gather") -> None:
        """Keep a value of ONNX Runtime, and what picks rows of it; for `Engine`."""
        self.value = value
        self._gather = gather

    def __len__(self) -> int:
        """The number of rows, n."""
        return int(self.value.shape()[0])

    def __getitem__(self, rows: NDArray[np.int64]) -> "DeviceRows":
        """The rows of these numbers, int64 [k], each from 0 to n - 1, any number of times.

        Raises:
            IndexError: there is no such row.
            EngineError: ONNX Runtime fails.
        """
        # A GPU does not say so: it gives zeros for a row that is not there.
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"a row from 0 to {len(self) - 1} was expected, not {rows.min()} to {rows.max()}")
        return DeviceRows(self._gather.pick(self.value, rows), self._gather)

    def numpy(self) -> NDArray[np.float32]:
        """A copy in the host's memory.

        Raises:
            EngineError: ONNX Runtime fails.
        """
        with engine_errors("ONNX Runtime cannot copy from the device"):
            return np.array(self.value.numpy())


Rows: TypeAlias = NDArray[np.float32] | DeviceRows
"""float32 rows [n, ...] where the engine's next graph wants them: an array, or on a GPU its `DeviceRows`."""


class Encoded(NamedTuple):
    """What the encoder makes of n photos' grids."""

    features: Rows
    """float32 [n, P, E]."""
    keys: Rows
    """float32 [n, P, A]: the attention's projection of the features."""
    initial_state: Rows
    """float32 [n, U]: the decoder's state before the first word."""


class Decoded(NamedTuple):
    """What the decoder says after one token of each of m rows."""

    log_probs: NDArray[np.float32]
    """float32 [m, V], natural logarithms."""
    next_state: Rows
    """float32 [m, U]."""
    attention: NDArray[np.float32]
    """float32 [m, P]."""


class Gather:
    """Picks rows of a tensor where it lies.

    Args:
        session: a session of `caption_rt._handmade.gather_model` on the device.
        device: the device.
    """

    def __init__(self, session: Any, device: Device) -> None:
        """Keep both."""
        self._session = session
        self._device = device

    def pick(self, value: Any, rows: NDArray[np.int64]) -> Any:
        """The rows of an array or a value of ONNX Runtime, as a value.

        Raises:
            EngineError: ONNX Runtime fails.
        """
        with engine_errors("ONNX Runtime failed to pick rows"):
            feeds = {DATA: value, ROWS: np.asarray(rows, np.int64)}
            return run_bound(self._session, feeds, {PICKED: self._device})[PICKED]


def padded(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The photos, and as many black ones as make up 1, 2, 4, 8 or a multiple of 8.

    cuDNN plans each convolution anew for each batch size, which takes longer than a few photos do: so there are few.
    """
    count = len(images)
    wanted = 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
    if wanted == count:
        return images
    return np.concatenate([images, np.zeros((wanted - count, *images.shape[1:]), images.dtype)])


def run_bound(session: Any, feeds: Mapping[str, Any], places: Mapping[str, Device | None]) -> dict[str, Any]:
    """Run a session with its inputs and outputs bound to where they are.

    A binding is made for each run, since it belongs to one thread; the memory of what it allocates is pooled by the
    session and goes back to the pool with the value.

    Args:
        session: the session.
        feeds: inputs by name: arrays, or values of ONNX Runtime, which are not moved if they are on the right device.
        places: outputs by name, each with the device that it is left on; None for the host.

    Returns:
        Values of ONNX Runtime by the names of the outputs.
    """
    binding = session.io_binding()
    for name, value in feeds.items():
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        else:
            binding.bind_ortvalue_input(name, value)
    for name, device in places.items():
        binding.bind_output(name, *(device or ("cpu", 0)))
    session.run_with_iobinding(binding)
    values = dict(zip(places, binding.get_outputs(), strict=True))
    # An output keeps its binding alive, and with it the inputs: the features would hold the grid.
    binding.clear_binding_inputs()
    return values


@contextlib.contextmanager
def engine_errors(what: str, remedy: str = "; caption-rt --doctor says what works") -> Iterator[None]:
    """The one seam where ONNX Runtime's errors become ours.

    Its exceptions have no common base: fifteen classes of its binding, beside ValueError and RuntimeError of its Python
    part. Nothing but ONNX Runtime runs inside, so every exception is one of its own.

    Args:
        what: the beginning of the sentence.
        remedy: its end.
    """
    try:
        yield
    except Exception as exc:
        reason = " ".join(str(exc).split())
        raise EngineError(f"{what}: {printable(reason[:300])}{remedy}") from exc
