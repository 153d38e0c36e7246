"""An examination of the installation: what is there, what works, and how to mend what does not.

What can be broken is imported where it is examined, so that one broken part costs one line and not the report.
"""

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import caption_rt
from caption_rt import _cuda, threads
from caption_rt.bundle import FORMAT_VERSION, MANIFEST_FILE, Bundle, default_bundle_path
from caption_rt.command_options import OPTION_NAMES
from caption_rt.devices import Device, installed_onnxruntimes, parse_device
from caption_rt.errors import CaptionError, EngineError, printable

if TYPE_CHECKING:
    from caption_rt.captioner import Captioner

__all__ = ["Finding", "Report", "Status", "examine"]

Status: TypeAlias = Literal["ok", "warning", "error"]
"""How a part is: "warning" is what works and should be mended all the same."""

_RANK: Mapping[Status, int] = {"ok": 0, "warning": 1, "error": 2}
_EXTRAS = {"matplotlib": "plot", "pillow-heif": "heif"}
_CUDA = "CUDAExecutionProvider"
# Without these no photo can be captioned.
_NEEDED = ("packages", "ONNX Runtime", "CPU", "CUDA", "bundle")
_ONE_OF_TWO = "reinstall exactly one of onnxruntime and onnxruntime-gpu"


@dataclass(frozen=True)
class Finding:
    """How one part of the installation is."""

    part: str
    """Which: "system", "packages", "ONNX Runtime", "CPU", "CUDA", "GPU", "threads", "bundle" or "self-test"."""
    status: Status
    """How it is."""
    text: str
    """What was found: one line for a person."""
    mend: str | None = None
    """What to do about a warning or an error, one line; None where the text says it, or nothing is to be done."""
    exit_code: int = 0
    """Of an error: that of the `CaptionError` which the part would raise in use."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The same for a program: JSON values."""

    def to_dict(self) -> dict[str, Any]:
        """The finding as values that `json.dumps` takes."""
        return {
            "part": self.part,
            "status": self.status,
            "text": self.text,
            "mend": self.mend,
            "facts": dict(self.facts),
        }


@dataclass(frozen=True)
class Report:
    """What an examination found."""

    findings: tuple[Finding, ...]
    """The parts, from the system to the self-test: each needs those before it."""

    @property
    def status(self) -> Status:
        """The worst of all parts."""
        return max((finding.status for finding in self.findings), key=_RANK.__getitem__)

    @property
    def exit_code(self) -> int:
        """0, or that of the first error: those after it may only follow from it."""
        return next((finding.exit_code for finding in self.findings if finding.status == "error"), 0)

    def to_dict(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes."""
        return {
            "status": self.status,
            "exit_code": self.exit_code,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def lines(self) -> list[str]:
        """The report for a person: a line a part, and one more for what to do."""
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.status:<8} {finding.part:<13} {finding.text}")
            if finding.mend is not None:
                lines.append(f"{'':<22} to mend it: {finding.mend}")
        return lines


def examine(
    model: str | None = None,
    device: str = "auto",
    intra_op_threads: int | None = None,
    precision: str | None = None,
) -> Report:
    """Examine the installation as a call with the same arguments would use it.

    A part that is broken is a finding and no error, whatever it raises.

    Args:
        model: folder or zip file of the bundle; None for the one that travels with the package.
        device: one of `caption_rt.devices.DEVICES`. That there is no GPU is an error only where CUDA is asked for.
        intra_op_threads: as `caption_rt.engine.Graph` takes it.
        precision: as `caption_rt.engine.Engine` takes it.

    Raises:
        OptionsError: an unknown device, or fewer than 1 thread.
    """
    asked = parse_device(device)
    threads.thread_count(intra_op_threads)
    opened: list[Bundle] = []
    parts: tuple[tuple[str, tuple[str, ...], Callable[[], Finding]], ...] = (
        ("system", (), _system),
        ("packages", (), _packages),
        ("ONNX Runtime", (), _onnxruntime),
        ("CPU", ("ONNX Runtime",), _cpu),
        ("CUDA", ("ONNX Runtime",), lambda: _cuda_provider(asked)),
        ("GPU", (), _gpus),
        ("threads", (), lambda: _threads(intra_op_threads)),
        ("bundle", (), lambda: _bundle(model, opened)),
        ("self-test", _NEEDED, lambda: _self_test(opened[0], device, intra_op_threads, precision)),
    )
    findings: dict[str, Finding] = {}
    for part, needed, look in parts:
        broken = [name for name in needed if findings[name].status == "error"]
        if broken:
            findings[part] = Finding(part, "warning", f"not examined: the error is in {' and '.join(broken)}")
        else:
            findings[part] = _examined(part, look)
    return Report(tuple(findings.values()))


def _examined(part: str, look: Callable[[], Finding]) -> Finding:
    """What a part's examination finds, or the error that it ends with."""
    try:
        return look()
    except CaptionError as exc:
        # A self-test that cannot be made, or fails, says itself what to do, but for what ONNX Runtime says.
        mend = None if part == "self-test" and exc.__cause__ is None else _mend(part)
        return Finding(part, "error", str(exc.renamed(OPTION_NAMES)), mend, exc.exit_code)
    # Whatever a broken package raises on import or in use is what is looked for here.
    except Exception as exc:
        text = f"{type(exc).__name__}: {printable(' '.join(str(exc).split())[:300])}"
        return Finding(part, "error", text, _mend(part), EngineError.exit_code)


def _mend(part: str) -> str | None:
    """What to do about an error whose sentence does not say it."""
    return {
        "packages": "pip install --force-reinstall numpy Pillow",
        "ONNX Runtime": _ONE_OF_TWO,
        "CPU": _ONE_OF_TWO,
        "bundle": "name another with --model, or get this one again; the one that travels along comes with a reinstall",
        "self-test": "try --device cpu, and another bundle, to see which of the two is at fault",
    }.get(part)


def _system() -> Finding:
    facts = {
        "caption_rt": caption_rt.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
    }
    text = f"caption-rt {facts['caption_rt']}, Python {facts['python']}, {facts['system']}, {facts['processor']}"
    return Finding("system", "ok", text, facts=facts)


def _processor() -> str:
    """The processor's name where Linux tells it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _packages() -> Finding:
    """NumPy, Pillow and the formats that it reads, and what is there of the extras."""
    numpy, pillow = importlib.import_module("numpy"), importlib.import_module("PIL")
    formats = _formats()
    extras = {name: _version(name) for name in _EXTRAS}
    facts = {"numpy": numpy.__version__, "pillow": pillow.__version__, "formats": formats, **extras}
    unread = [name for name, readable in formats.items() if not readable]
    text = f"numpy {facts['numpy']}, Pillow {facts['pillow']} reads {', '.join(n for n in formats if formats[n])}"
    text += f" and not {', '.join(unread)}" if unread else ""
    for name, version in extras.items():
        text += f"; {name} {version}" if version else f"; no {name} (extra {_EXTRAS[name]})"
    return Finding("packages", "ok", text, facts=facts)


def _formats() -> dict[str, bool]:
    """Which kinds of photo can be read."""
    features = importlib.import_module("PIL.features")
    # What Pillow does not list it has either always or never had.
    known = {*features.modules, *features.codecs, *features.features}
    needed = {"JPEG": "jpg", "PNG": "zlib", "WebP": "webp", "AVIF": "avif"}
    readable = {name: feature in known and bool(features.check(feature)) for name, feature in needed.items()}
    return {**readable, "GIF": True, "TIFF": True, "BMP": True, "HEIC": _version("pillow-heif") is not None}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _onnxruntime() -> Finding:
    """Which distributions of ONNX Runtime are installed, and which version imports."""
    installed = installed_onnxruntimes()
    facts: dict[str, Any] = {"installed": installed, "version": None, "providers": []}
    listed = ", ".join(f"{name} {version}" for name, version in installed.items()) or "no distribution is installed"
    try:
        engine = importlib.import_module("caption_rt.engine")
    except CaptionError as exc:
        return Finding("ONNX Runtime", "error", f"{exc} (installed: {listed})", None, exc.exit_code, facts)
    facts |= {"version": engine.version(), "providers": list(engine.built_in_providers())}
    text = f"{facts['version']} ({listed}), built with {', '.join(facts['providers'])}"
    if len(installed) > 1:
        mend = f"pip uninstall -y {' '.join(installed)}, then install the one that is wanted"
        text += ": the one installed last has overwritten the other"
        return Finding("ONNX Runtime", "warning", text, mend, facts=facts)
    return Finding("ONNX Runtime", "ok", text, facts=facts)


def _cpu() -> Finding:
    provider = importlib.import_module("caption_rt.engine").try_provider("cpu")
    return Finding("CPU", "ok", f"{provider} works", facts={"provider": provider, "works": True})


def _cuda_provider(asked: Device | None) -> Finding:
    """Whether CUDA works, and how bad it is if not: that depends on what was asked for."""
    engine = importlib.import_module("caption_rt.engine")
    device = asked if asked is not None and asked.type == "cuda" else Device("cuda", 0)
    missing = engine.cuda_missing(device.number)
    facts: dict[str, Any] = {"provider": _CUDA, "device": device.name, "works": missing is None}
    wanted = asked == device
    # Who asks for the CPU misses nothing.
    status: Status = "error" if wanted else "warning" if asked is None else "ok"
    code = EngineError.exit_code if wanted else 0
    if missing is not None:
        if status == "ok" or (missing.expected and not wanted):
            return Finding("CUDA", "ok", f"not used: {missing.what}", facts=facts)
        return Finding("CUDA", status, f"{device.name} cannot be used: {missing.what}", missing.mend, code, facts)
    try:
        engine.try_provider(device.name)
    except EngineError as exc:
        facts["works"] = False
        mend = "update the driver, or install the versions of CUDA and cuDNN that ONNX Runtime names"
        return Finding("CUDA", status, f"{device.name} does not work: {exc}", mend, code, facts)
    return Finding("CUDA", "ok", f"{_CUDA} works on {device.name}", facts=facts)


def _gpus() -> Finding:
    """What the NVIDIA driver says."""
    facts: dict[str, Any] = {"driver_cuda": None, "gpus": []}
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        facts["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    try:
        driver, gpus = _cuda.find_driver(), _cuda.find_gpus()
    except (_cuda.NoDriver, _cuda.DriverFailed) as exc:
        return Finding("GPU", "ok", f"none: {exc}", facts=facts)
    facts["driver_cuda"] = ".".join(map(str, driver.version))
    facts["gpus"] = [
        {"name": gpu.name, "memory": gpu.memory, "compute_capability": ".".join(map(str, gpu.compute))} for gpu in gpus
    ]
    listed = ", ".join(f"cuda:{n} {printable(gpu.name)} ({gpu.memory / 2**30:.1f} GiB)" for n, gpu in enumerate(gpus))
    return Finding("GPU", "ok", f"{listed}; the driver runs CUDA up to {facts['driver_cuda']}", facts=facts)


def _threads(asked: int | None) -> Finding:
    quota, cpus = threads.quota(), threads.affinity()
    facts = {
        "machine": os.cpu_count(),
        "affinity": sorted(cpus),
        "quota": quota,
        "usable": threads.usable_cpus(),
        "physical_cores": len(threads.physical_cores(cpus)),
        "intra_op_threads": threads.thread_count(asked) or None,
    }
    used = facts["intra_op_threads"] or "as many as ONNX Runtime counts cores"
    text = f"{used} for the network; of {facts['machine']} processors {len(cpus)} by affinity"
    text += f", {quota:.2g} by the CPU quota" if quota is not None else ", no CPU quota"
    if asked is not None and asked > threads.usable_cpus():
        mend = f"--threads {threads.usable_cpus()} or fewer, or leave it out"
        return Finding("threads", "warning", f"{text}: more than it may use", mend, facts=facts)
    return Finding("threads", "ok", text, facts=facts)


def _bundle(model: str | None, opened: list[Bundle]) -> Finding:
    """Open the bundle, which checks the size and the SHA-256 of every file; keep it for the self-test."""
    bundle = Bundle.open(default_bundle_path() if model is None else model)
    opened.append(bundle)
    manifest = bundle.manifest
    size = sum(spec.size for spec in manifest.files.values())
    facts = {
        "path": str(bundle.path),
        "name": manifest.name,
        "format_version": FORMAT_VERSION,
        "bytes": size,
        "files": sorted([MANIFEST_FILE, *manifest.files]),
        "words": len(bundle.vocabulary),
        "precisions": list(manifest.precisions),
    }
    text = f"{printable(manifest.name)} in {', '.join(manifest.precisions)}, {size / 1e6:.1f} MB, "
    text += f"format {FORMAT_VERSION}, all files as its manifest says"
    return Finding("bundle", "ok", f"{text} ({printable(bundle.path)})", facts=facts)


def _self_test(bundle: Bundle, device: str, intra_op_threads: int | None, precision: str | None) -> Finding:
    module = importlib.import_module("caption_rt.captioner")
    captioner: Captioner = module.Captioner.load(bundle, device, intra_op_threads=intra_op_threads, precision=precision)
    with captioner:
        result, fallback = captioner.self_test(), captioner.fallback
        facts = {
            "photos": result.photos,
            "provider": result.provider,
            "precision": result.precision,
            "device": captioner.device,
            "fallback": fallback,
            "max_difference": result.max_difference,
            "tolerance": result.tolerance,
        }
    text = (
        f"passed, {result.photos} photos on {facts['device']} in {result.precision}, log-probabilities within "
        f"{result.max_difference:.1g} ({result.tolerance:.1g} allowed)"
    )
    if fallback is not None:
        return Finding(
            "self-test", "warning", f"{text}, on the CPU because CUDA cannot be used: {fallback}", facts=facts
        )
    engine = importlib.import_module("caption_rt.engine")
    if result.precision == "int8" and facts["device"] == "cpu" and not engine.multiplies_exactly():
        text += "; this processor cannot sum products of 8 bits exactly: captions may be worse"
        mend = "take another precision with --precision, or a bundle exported with --reduce-range"
        return Finding("self-test", "warning", text, mend, facts=facts)
    return Finding("self-test", "ok", text, facts=facts)
