"""ONNX Runtime: providers, sessions, threads. The only file that imports onnxruntime."""

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from caption_rt import _cuda
from caption_rt.bundle import Bundle, GraphSpec, TensorSpec
from caption_rt.errors import BundleError, EngineError, OptionsError, printable

try:
    import onnxruntime

    # What is left of the package when one of onnxruntime and onnxruntime-gpu was uninstalled beside the other.
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ImportError("the package is incomplete")
except ImportError as exc:
    raise EngineError(
        f"ONNX Runtime cannot be imported ({printable(exc)}): reinstall exactly one of onnxruntime and onnxruntime-gpu"
    ) from exc

_log = logging.getLogger(__name__)

__all__ = ["DEVICES", "Decoded", "Encoded", "Engine", "Graph"]

DEVICES = ("auto", "cpu", "cuda")
"""What `Engine` can be asked for: "auto" takes CUDA where it works and else the CPU; "cuda" is CUDA or an error."""

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_CUDA_OPTIONS = {
    # The exhaustive search, ONNX Runtime's default, is repeated for each new batch size and takes seconds.
    "cudnn_conv_algo_search": "HEURISTIC",
    # TensorFloat-32 keeps 10 bits of the mantissa: captions would differ from those of the CPU.
    "use_tf32": "0",
}
_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(int64)": "int64"}


class Encoded(NamedTuple):
    """What the encoder makes of n photos' grids."""

    features: NDArray[np.float32]
    """float32 [n, P, E]."""
    keys: NDArray[np.float32]
    """float32 [n, P, A]: the attention's projection of the features."""
    initial_state: NDArray[np.float32]
    """float32 [n, U]: the decoder's state before the first word."""


class Decoded(NamedTuple):
    """What the decoder says after one token of each of m rows."""

    log_probs: NDArray[np.float32]
    """float32 [m, V], natural logarithms."""
    next_state: NDArray[np.float32]
    """float32 [m, U]."""
    attention: NDArray[np.float32]
    """float32 [m, P]."""


class Graph:
    """One ONNX graph in a session of its own.

    Args:
        model: the ONNX file's bytes.
        spec: what its inputs and outputs must be.
        device: see `DEVICES`.
        intra_op_threads: threads that share the work of one operator; None leaves it to ONNX Runtime, which takes one a
            physical core, or, where the process may not use all processors, one for each that it may use.

    Raises:
        OptionsError: an unknown device, or fewer than 1 thread.
        BundleError: the graph's inputs and outputs are not those of `spec`.
        EngineError: ONNX Runtime cannot load the graph, or the device cannot be used.
    """

    def __init__(self, model: bytes, spec: GraphSpec, device: str = "cpu", intra_op_threads: int | None = None) -> None:
        """Load the graph."""
        self._spec = spec
        self._names = [tensor.name for tensor in spec.outputs]
        options = _session_options(intra_op_threads)
        chosen = _choose(device)
        providers = [(_CUDA, _CUDA_OPTIONS), _CPU] if chosen == "cuda" else [_CPU]
        with _engine_errors(f"ONNX Runtime {onnxruntime.__version__} cannot load {spec.file}"):
            # Without the fallback of the Python wrapper, which prints to standard output and goes on with the CPU.
            self._session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
        if chosen == "cuda" and self.provider != _CUDA:
            raise EngineError(f"CUDA was asked for and ONNX Runtime runs {spec.file} on {self.provider}")
        _check_tensors(spec.file, "input", spec.inputs, self._session.get_inputs())
        _check_tensors(spec.file, "output", spec.outputs, self._session.get_outputs())

    @property
    def provider(self) -> str:
        """The execution provider that the session really has: "CPUExecutionProvider" or "CUDAExecutionProvider"."""
        return str(self._session.get_providers()[0])

    def run(self, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Run the graph.

        Args:
            *inputs: arrays in the order of the spec's inputs, of their shapes and dtypes.

        Returns:
            Arrays in the order of the spec's outputs.

        Raises:
            EngineError: ONNX Runtime fails, or takes no such input.
        """
        feeds = {tensor.name: array for tensor, array in zip(self._spec.inputs, inputs, strict=True)}
        with _engine_errors(f"ONNX Runtime failed in {self._spec.file}"):
            return tuple(self._session.run(self._names, feeds))


class Engine:
    """The three graphs of a bundle, ready to run. Safe to use from several threads.

    Args:
        bundle: the bundle.
        device: see `DEVICES`.
        intra_op_threads: see `Graph`.

    Raises:
        OptionsError: an unknown device, or fewer than 1 thread.
        BundleError: a graph does not have the inputs and outputs that the manifest states.
        EngineError: ONNX Runtime cannot load a graph, or the device cannot be used.
    """

    def __init__(self, bundle: Bundle, device: str = "auto", intra_op_threads: int | None = None) -> None:
        """Load the three graphs."""
        chosen = _choose(device)
        try:
            self._load(bundle, chosen, intra_op_threads)
            if chosen == "cuda" and device == "auto":
                # A GPU that is too old or too full shows when the first photo runs, not when a session loads.
                size = bundle.manifest.image.size
                self.extract(np.zeros((1, size, size, 3), np.uint8))
        except EngineError as exc:
            if chosen == device:
                raise
            _log.info("CUDA does not work, the CPU is used: %s", exc)
            self._load(bundle, "cpu", intra_op_threads)

    @property
    def provider(self) -> str:
        """The execution provider of the extractor, which is nearly all of the work."""
        return self._extractor.provider

    def _load(self, bundle: Bundle, device: str, intra_op_threads: int | None) -> None:
        def load(name: str) -> Graph:
            spec = bundle.manifest.graphs[name]
            return Graph(bundle.read(spec.file), spec, device, intra_op_threads)

        self._extractor, self._encoder, self._decoder = load("extractor"), load("encoder"), load("decoder")

    def extract(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The grids of photos.

        Args:
            images: uint8 [n, S, S, 3], as `caption_rt.image.read_photo` gives each.

        Returns:
            float32 [n, P, C].

        Raises:
            EngineError: ONNX Runtime fails.
        """
        return self._extractor.run(images)[0]

    def encode(self, grid: NDArray[np.float32]) -> Encoded:
        """Features, keys and initial states of grids, float32 [n, P, C].

        Raises:
            EngineError: ONNX Runtime fails.
        """
        return Encoded(*self._encoder.run(grid))

    def decode(
        self,
        token: NDArray[np.int64],
        state: NDArray[np.float32],
        features: NDArray[np.float32],
        keys: NDArray[np.float32],
    ) -> Decoded:
        """One word further in each of m captions.

        Args:
            token: int64 [m]: the last token ids.
            state: float32 [m, U].
            features: float32 [m, P, E]: those of each row's photo.
            keys: float32 [m, P, A].

        Raises:
            EngineError: ONNX Runtime fails.
        """
        return Decoded(*self._decoder.run(token, state, features, keys))


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    """The one seam where ONNX Runtime's errors become ours.

    Its exceptions have no common base: fifteen classes of its binding, beside ValueError and RuntimeError of its Python
    part. Nothing but ONNX Runtime runs inside, so every exception is one of its own.
    """
    try:
        yield
    except Exception as exc:
        reason = " ".join(str(exc).split())
        raise EngineError(f"{what}: {printable(reason[:300])}") from exc


def _session_options(intra_op_threads: int | None) -> Any:
    if intra_op_threads is not None and intra_op_threads < 1:
        raise OptionsError(f"intra_op_threads must be at least 1, not {intra_op_threads}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Errors come as exceptions; logged as well, they would reach standard error beside our own sentence.
    options.log_severity_level = 4
    # Threads of the three sessions would otherwise go on spinning after each run, in the way of the next session's: 1.6
    # times slower.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads = intra_op_threads or _default_threads()
    return options


def _default_threads() -> int:
    """0 (ONNX Runtime's choice), or the processors of a process that may not use all of them.

    ONNX Runtime counts the machine's cores and binds a thread to each, which fails, with a line on standard error, for
    those that the process may not use (taskset, a container's cpuset).
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0
    usable = len(os.sched_getaffinity(0))
    return 0 if usable == os.cpu_count() else usable


def _choose(device: str) -> str:
    """What a device that was asked for means on this machine: "cpu" or "cuda".

    Raises:
        OptionsError: an unknown device.
        EngineError: CUDA was asked for by name and cannot be had.
    """
    if device not in DEVICES:
        raise OptionsError(f"the device is one of {', '.join(DEVICES)}, not {printable(device)!r}")
    if device == "cpu":
        return "cpu"
    missing = _missing_cuda()
    if missing is None:
        return "cuda"
    if device == "cuda":
        raise EngineError(f"CUDA cannot be used: {missing}")
    return "cpu"


@functools.cache
def _missing_cuda() -> str | None:
    """What is missing for CUDA, as half a sentence; None where a session can be asked for it."""
    if _CUDA not in onnxruntime.get_available_providers():
        return "the installed onnxruntime package is built without it; onnxruntime-gpu has it"
    missing = _cuda.missing_driver()
    if missing is not None:
        return missing
    # Loads CUDA and cuDNN from the packages of the extra `cuda` where they are installed; prints what it does not find.
    try:
        with warnings.catch_warnings(), _engine_errors("ONNX Runtime cannot load its libraries"):
            warnings.simplefilter("ignore")
            _cuda.silenced(onnxruntime.preload_dlls)
    except EngineError as exc:
        return str(exc)
    missing = _cuda.missing_library(onnxruntime.cuda_version)
    return missing and f"{missing}: pip install 'caption-rt[cuda]' brings them"


def _check_tensors(file: str, kind: str, specs: tuple[TensorSpec, ...], actual: list[Any]) -> None:
    """The graph's real inputs or outputs must be those of the manifest, in any order."""
    found = {node.name: node for node in actual}
    if sorted(found) != sorted(spec.name for spec in specs):
        raise BundleError(f"{file} has the {kind}s {printable(', '.join(sorted(found)))}, not those of its manifest")
    for spec in specs:
        node = found[spec.name]
        # A free axis is a name, or None where the graph has no name for it.
        shape = tuple(axis if isinstance(axis, int) else None for axis in node.shape)
        wanted = tuple(axis if isinstance(axis, int) else None for axis in spec.shape)
        if shape != wanted or _DTYPES.get(node.type) != spec.dtype:
            raise BundleError(
                f"{file}: the {kind} {spec.name} is {printable(node.type)} {printable(list(node.shape))}, "
                f"and its manifest states {spec.dtype} {list(spec.shape)}"
            )
