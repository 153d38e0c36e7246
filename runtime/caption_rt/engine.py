"""ONNX Runtime: providers, sessions, threads, and rows that stay on a GPU. The only file that imports onnxruntime."""

import functools
import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from caption_rt import _cuda, graph_cache
from caption_rt._handmade import gather_model, product_model
from caption_rt._rows import Decoded, DeviceRows, Encoded, Gather, Rows, engine_errors, padded, run_bound
from caption_rt._tensors import check_tensors
from caption_rt.bundle import PRECISIONS, Bundle, GraphSpec
from caption_rt.devices import Device, Missing, missing_cuda, parse_device
from caption_rt.errors import EngineError, OptionsError, printable
from caption_rt.threads import thread_count, usable_cpus, worker_processors

try:
    import onnxruntime

    # What is left of the package when one of onnxruntime and onnxruntime-gpu was uninstalled beside the other.
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ImportError("the package is incomplete")
except ImportError as exc:
    # pybind11 reports whatever ends a module's initialisation as an ImportError: Ctrl-C too.
    if isinstance(exc.__cause__, KeyboardInterrupt):
        raise exc.__cause__ from None
    raise EngineError(
        f"ONNX Runtime cannot be imported ({printable(exc)}): reinstall exactly one of onnxruntime and onnxruntime-gpu"
    ) from exc

_log = logging.getLogger(__name__)

__all__ = [
    "Decoded",
    "DeviceRows",
    "Encoded",
    "Engine",
    "Graph",
    "Rows",
    "built_in_providers",
    "check_precision",
    "cuda_missing",
    "multiplies_exactly",
    "try_provider",
    "version",
]

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_CUDA_OPTIONS = {
    # cuDNN's own advice on which algorithm suits a convolution. The exhaustive search, ONNX Runtime's default, is done
    # anew for each batch size and takes seconds; DEFAULT is slower in every run.
    "cudnn_conv_algo_search": "HEURISTIC",
    # TensorFloat-32 keeps 10 bits of the mantissa: captions would differ from those of the CPU.
    "use_tf32": "0",
}
# Devices on which tensors stay from graph to graph. On the CPU this gains nothing; tests add it, to run the same code.
_BOUND_TYPES = frozenset({"cuda"})
# Photos that go through the extractor together on a CPU. More are no faster and take memory: InceptionV3 at 299 pixels
# has 850 MiB with 16 at once, 510 with 4 at a time.
_CPU_PHOTOS = 4
# What a bundle is run in on a device where nothing else is asked for: the first that it has.
_PREFERRED = {"cuda": ("fp16", "fp32", "int8"), "cpu": ("int8", "fp32", "fp16")}
# The same on a CPU that cannot sum products of 8 bits exactly.
_PREFERRED_INEXACT = ("fp32", "fp16", "int8")
# A graph that is kept has its weights in a file of their own, which is mapped; all but the smallest (in bytes).
_WEIGHTS_APART = {
    "session.optimized_model_external_initializers_file_name": graph_cache.WEIGHTS_FILE,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


class Graph:
    """One ONNX graph in a session of its own.

    Args:
        model: the ONNX file's bytes, or what gives them if they are needed.
        spec: what its inputs and outputs must be.
        device: one of `caption_rt.devices.DEVICES`.
        intra_op_threads: threads that share the work of one operator; None for as many as there are physical cores that
            this process may use, see `caption_rt.threads.thread_count`.
        sha256: that of the ONNX file, under which the graph as it is optimised for this machine's processor is kept and
            found again (see `caption_rt.graph_cache`); None where it is not to be kept.

    Raises:
        OptionsError: an unknown device, or fewer than 1 thread.
        BundleError: the graph's inputs and outputs are not those of `spec`.
        EngineError: ONNX Runtime cannot load the graph, or the device cannot be used.
    """

    def __init__(
        self,
        model: bytes | Callable[[], bytes],
        spec: GraphSpec,
        device: str = "cpu",
        intra_op_threads: int | None = None,
        *,
        sha256: str | None = None,
    ) -> None:
        """Load the graph."""
        self._spec = spec
        self._names = [tensor.name for tensor in spec.outputs]
        chosen, _ = _choose(device)
        self._device = chosen
        self._session = _session(model, spec.file, chosen, intra_op_threads, sha256)
        check_tensors(spec.file, "input", spec.inputs, self._session.get_inputs())
        check_tensors(spec.file, "output", spec.outputs, self._session.get_outputs())

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
        with engine_errors(f"ONNX Runtime failed in {self._spec.file}"):
            return tuple(self._session.run(self._names, self._feeds(inputs)))

    def run_bound(self, *inputs: NDArray[Any] | DeviceRows, host: tuple[str, ...] = ()) -> dict[str, Any]:
        """Run the graph where its tensors are: arrays go up to the device, `DeviceRows` are there already.

        Args:
            *inputs: in the order of the spec's inputs.
            host: names of the outputs that are wanted in the host's memory; all others stay on the device.

        Returns:
            ONNX Runtime's values by the names of the outputs; for those of `host`, arrays.

        Raises:
            EngineError: ONNX Runtime fails, or takes no such input.
        """
        feeds = self._feeds([rows.value if isinstance(rows, DeviceRows) else rows for rows in inputs])
        places = {name: None if name in host else self._device for name in self._names}
        with engine_errors(f"ONNX Runtime failed in {self._spec.file}"):
            values = run_bound(self._session, feeds, places)
            return {name: value.numpy() if name in host else value for name, value in values.items()}

    def _feeds(self, inputs: Sequence[Any]) -> dict[str, Any]:
        return {tensor.name: value for tensor, value in zip(self._spec.inputs, inputs, strict=True)}


class _Graphs(NamedTuple):
    """What an engine runs."""

    extractor: Graph
    encoder: Graph
    decoder: Graph
    gather: Gather | None
    """None where tensors do not stay on the device."""


class Engine:
    """The three graphs of a bundle, ready to run. Safe to use from several threads.

    Args:
        bundle: the bundle.
        device: one of `caption_rt.devices.DEVICES`. Where it is CUDA, a photo is tried before the engine is there.
        intra_op_threads: see `Graph`.
        precision: one of `caption_rt.bundle.PRECISIONS`; None for the best that the bundle has for the device.

    Raises:
        OptionsError: an unknown device, fewer than 1 thread, or a precision that the bundle does not have.
        BundleError: a graph does not have the inputs and outputs that the manifest states.
        EngineError: ONNX Runtime cannot load a graph, or the device cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "auto",
        intra_op_threads: int | None = None,
        precision: str | None = None,
    ) -> None:
        """Load the three graphs."""
        check_precision(bundle, precision)
        self._graphs: _Graphs | None = None
        self._threads = thread_count(intra_op_threads)
        self._device, missing = _choose(device)
        self._fallback = None if missing is None or missing.expected else missing.reason
        try:
            self._load(bundle, intra_op_threads, precision)
            if self._device.type == "cuda":
                self._try_a_photo(bundle)
        except EngineError as exc:
            if device != "auto" or self._device.type == "cpu":
                raise
            self._device, self._fallback = Device("cpu", 0), str(exc)
            self._load(bundle, intra_op_threads, precision)
        if self._fallback is not None:
            _log.info("the CPU is used, because CUDA cannot be: %s", self._fallback)

    @property
    def provider(self) -> str:
        """The execution provider of the extractor, which is nearly all of the work."""
        return self._loaded().extractor.provider

    @property
    def device(self) -> str:
        """Where it runs: "cpu", "cuda:0"."""
        return self._device.name

    @property
    def precision(self) -> str:
        """What it computes in: one of `caption_rt.bundle.PRECISIONS`."""
        return self._precision

    @property
    def fallback(self) -> str | None:
        """Why device "auto" is the CPU although there is an NVIDIA driver, as part of a sentence; None otherwise."""
        return self._fallback

    @property
    def intra_op_threads(self) -> int:
        """How many threads share the work of one operator.

        Where the system tells nothing of physical cores (not Linux) and none were asked for, ONNX Runtime takes one a
        physical core, and this is the number of processors: the most that it can be.
        """
        return self._threads or usable_cpus()

    def close(self) -> None:
        """Let the sessions go, with their memory and threads; runs that are under way in other threads still end.

        What is asked of a closed engine raises EngineError.
        """
        self._graphs = None

    def extract(self, images: NDArray[np.uint8]) -> Rows:
        """The grids of photos.

        Args:
            images: uint8 [n, S, S, 3], as `caption_rt.image.read_photo` gives each.

        Returns:
            float32 [n, P, C].

        Raises:
            EngineError: ONNX Runtime fails.
        """
        graphs = self._loaded()
        if graphs.gather is None:
            starts = range(0, len(images), _CPU_PHOTOS)
            return np.concatenate([graphs.extractor.run(images[start : start + _CPU_PHOTOS])[0] for start in starts])
        values = graphs.extractor.run_bound(padded(images))
        grid = DeviceRows(values["grid"], graphs.gather)
        return grid if len(grid) == len(images) else grid[np.arange(len(images))]

    def encode(self, grid: Rows) -> Encoded:
        """Features, keys and initial states of grids, float32 [n, P, C].

        Raises:
            EngineError: ONNX Runtime fails.
        """
        graphs = self._loaded()
        if graphs.gather is None:
            return Encoded(*graphs.encoder.run(_array(grid)))
        values = graphs.encoder.run_bound(grid)
        return Encoded(*(DeviceRows(values[name], graphs.gather) for name in Encoded._fields))

    def decode(self, token: NDArray[np.int64], state: Rows, features: Rows, keys: Rows) -> Decoded:
        """One word further in each of m captions.

        Args:
            token: int64 [m]: the last token ids.
            state: float32 [m, U].
            features: float32 [m, P, E]: those of each row's photo.
            keys: float32 [m, P, A].

        Raises:
            EngineError: ONNX Runtime fails.
        """
        graphs = self._loaded()
        if graphs.gather is None:
            return Decoded(*graphs.decoder.run(token, _array(state), _array(features), _array(keys)))
        values = graphs.decoder.run_bound(token, state, features, keys, host=("log_probs", "attention"))
        return Decoded(**values | {"next_state": DeviceRows(values["next_state"], graphs.gather)})

    def _load(self, bundle: Bundle, intra_op_threads: int | None, precision: str | None) -> None:
        precisions = bundle.manifest.precisions
        self._precision = precision or _best_precision(self._device, precisions)

        def load(name: str) -> Graph:
            spec = precisions[self._precision][name]
            file = bundle.manifest.files[spec.file]
            kept = file.sha256 if file.size >= graph_cache.LEAST_SIZE else None
            try:
                return Graph(lambda: bundle.read(spec.file), spec, self._device.name, intra_op_threads, sha256=kept)
            finally:
                bundle.let_go(spec.file)

        bound = self._device.type in _BOUND_TYPES
        gather = _gather(self._device, intra_op_threads) if bound else None
        self._graphs = _Graphs(load("extractor"), load("encoder"), load("decoder"), gather)

    def _loaded(self) -> _Graphs:
        if self._graphs is None:
            raise EngineError("the engine is closed: make another")
        return self._graphs

    def _try_a_photo(self, bundle: Bundle) -> None:
        """A GPU that is too old or too full shows when the first photo runs, not when a session loads."""
        size = bundle.manifest.image.size
        encoded = self.encode(self.extract(np.zeros((1, size, size, 3), np.uint8)))
        first = np.zeros(1, np.int64)
        self.decode(first, encoded.initial_state[first], encoded.features, encoded.keys)


def check_precision(bundle: Bundle, precision: str | None) -> None:
    """See that a bundle has a precision.

    Args:
        bundle: the bundle.
        precision: what is asked for; None for whatever is best.

    Raises:
        OptionsError: it is none of `caption_rt.bundle.PRECISIONS`, or the bundle does not have it.
    """
    there = bundle.manifest.precisions
    if precision is None:
        return
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise OptionsError(f"the precision is one of {', '.join(PRECISIONS)}, not {printable(repr(precision))}")
    if precision not in there:
        raise OptionsError(f"the bundle {printable(bundle.path)} has no {precision}: it has {' and '.join(there)}")


@functools.cache
def cuda_missing(number: int = 0) -> Missing | None:
    """What is missing for CUDA on a GPU; None where a session can be asked for it."""
    return missing_cuda(
        number,
        built_in=_CUDA in built_in_providers(),
        cuda_version=getattr(onnxruntime, "cuda_version", None),
        preload=_preload,
    )


def built_in_providers() -> tuple[str, ...]:
    """The execution providers that the installed ONNX Runtime was built with; `try_provider` says whether one works."""
    return tuple(onnxruntime.get_available_providers())


def version() -> str:
    """The version of ONNX Runtime that is imported."""
    return str(onnxruntime.__version__)


def try_provider(device: str) -> str:
    """Run a graph of one node on a device.

    Returns:
        The execution provider that ran it.

    Raises:
        OptionsError: an unknown device.
        EngineError: the device cannot be used.
    """
    chosen, _ = _choose(device)
    gather = _gather(chosen)
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    picked = gather.pick(values, np.array([2, 0]))
    if not np.array_equal(DeviceRows(picked, gather).numpy(), values[[2, 0]]):
        mend = "update NVIDIA's driver, or use the device cpu" if chosen.type == "cuda" else "reinstall ONNX Runtime"
        raise EngineError(f"{chosen.name} gives wrong numbers: {mend}")
    return _CUDA if chosen.type == "cuda" else _CPU


@functools.cache
def multiplies_exactly() -> bool:
    """Whether ONNX Runtime sums products of unsigned and signed numbers of 8 bits exactly on this CPU.

    x86 processors without VNNI add two of them in 16 bits, which are too few for large ones: an int8 graph then runs,
    and gives wrong grids (docs/export.md has figures). It is tried rather than looked up in a list of processors.
    """
    session = _new_session(product_model(), "the graph that multiplies", Device("cpu", 0), _session_options(1))
    unsigned, signed = np.full((1, 2), 255, np.uint8), np.full((2, 1), 127, np.int8)
    return int(session.run(None, {"unsigned": unsigned, "signed": signed})[0][0, 0]) == 2 * 255 * 127


def _best_precision(device: Device, precisions: Collection[str]) -> str:
    preferred = _PREFERRED[device.type]
    if device.type == "cpu" and "int8" in precisions and len(precisions) > 1 and not multiplies_exactly():
        preferred = _PREFERRED_INEXACT
    return next(name for name in preferred if name in precisions)


def _array(rows: Rows) -> NDArray[np.float32]:
    return rows.numpy() if isinstance(rows, DeviceRows) else rows


def _gather(device: Device, intra_op_threads: int | None = None) -> Gather:
    return Gather(_session(gather_model(), "the graph that picks rows", device, intra_op_threads), device)


def _session(
    model: bytes | Callable[[], bytes],
    name: str,
    device: Device,
    intra_op_threads: int | None,
    sha256: str | None = None,
) -> Any:
    """A session on a device, or an error; see `Graph`.

    Raises:
        OptionsError: fewer than 1 thread.
        EngineError: ONNX Runtime cannot load the graph, or does not run it on the device.
    """

    def read() -> bytes:
        return model if isinstance(model, bytes) else model()

    folder = graph_cache.cache_folder() if sha256 is not None and device.type == "cpu" else None
    if sha256 is None or folder is None:
        return _new_session(read(), name, device, _session_options(intra_op_threads))
    cache, key = graph_cache.GraphCache(folder), graph_cache.graph_key(sha256, onnxruntime.__version__)
    if (optimised := cache.find(key)) is not None:
        options = _session_options(intra_op_threads)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return _new_session(str(optimised), name, device, options)
        except EngineError as exc:
            _log.info("the optimised graph of %s is thrown away: %s", name, exc)
            cache.drop(key)
    options = _session_options(intra_op_threads)
    with cache.writing(key) as path:
        if path is not None:
            options.optimized_model_filepath = str(path)
            for entry in _WEIGHTS_APART.items():
                options.add_session_config_entry(*entry)
            try:
                return _new_session(read(), name, device, options)
            except EngineError:
                # Whether it is the graph, or the disk that is full, shows without the file.
                options.optimized_model_filepath = ""
        return _new_session(read(), name, device, options)


def _new_session(model: bytes | str, name: str, device: Device, options: Any) -> Any:
    """A session on a device with all its options, of an ONNX file's bytes or its path.

    Raises:
        EngineError: ONNX Runtime cannot load the graph, or does not run it on the device.
    """
    cuda = (_CUDA, _CUDA_OPTIONS | {"device_id": str(device.number)})
    providers = [cuda, _CPU] if device.type == "cuda" else [_CPU]
    with engine_errors(f"ONNX Runtime {onnxruntime.__version__} cannot load {name}"):
        # Without the fallback of the Python wrapper, which prints to standard output and goes on with the CPU.
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    actual = session.get_providers()[0]
    if device.type == "cuda" and actual != _CUDA:
        raise EngineError(f"CUDA was asked for and ONNX Runtime runs {name} on {actual}: caption-rt --doctor says more")
    return session


def _session_options(intra_op_threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Errors come as exceptions; logged as well, they would reach standard error beside our own sentence.
    options.log_severity_level = 4
    # A thread that has nothing to do spins, to be quick when the next operator needs it. The processor is then missing
    # where it is needed, in the next session or in whoever reads the next photo: so a thread spins for microseconds,
    # which is as quick, and not at all once a run has ended. benchmarks/threads.py measures it.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "10")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads = thread_count(intra_op_threads)
    # ONNX Runtime counts processors from 1: "2,10;3,11" binds two threads, each to two.
    if bound := ";".join(",".join(str(cpu + 1) for cpu in core) for core in worker_processors(intra_op_threads)):
        options.add_session_config_entry("session.intra_op_thread_affinities", bound)
    return options


def _choose(device: str) -> tuple[Device, Missing | None]:
    """The device that a name means on this machine, and where "auto" is the CPU, what is missing for CUDA.

    Raises:
        OptionsError: an unknown device.
        EngineError: CUDA was asked for by name and cannot be had.
    """
    asked = parse_device(device)
    wanted = asked or Device("cuda", 0)
    missing = cuda_missing(wanted.number) if wanted.type == "cuda" else None
    if missing is None:
        return wanted, None
    if asked is not None:
        raise EngineError(f"{wanted.name} cannot be used: {missing.reason}")
    return Device("cpu", 0), missing


def _preload() -> None:
    """Load CUDA and cuDNN from the packages of the extra `cuda` where they are installed."""
    with warnings.catch_warnings(), engine_errors("ONNX Runtime cannot load its libraries", ""):
        warnings.simplefilter("ignore")
        # It prints what it does not find.
        _cuda.silenced(onnxruntime.preload_dlls)
