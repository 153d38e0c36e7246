"""The examination: what is broken costs its own line, says how to mend it, and never the report."""

import ctypes
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys

import onnxruntime
import pytest

import caption_rt
from caption_rt import _cuda, doctor, engine, threads
from caption_rt.bundle import default_bundle_path
from caption_rt.doctor import Finding, Report, examine
from caption_rt.errors import OptionsError

PARTS = ["system", "packages", "ONNX Runtime", "CPU", "CUDA", "GPU", "threads", "bundle", "self-test"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """A machine without an NVIDIA driver, as the tests know it; what was found out about CUDA is forgotten."""

    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    engine.cuda_missing.cache_clear()
    yield
    engine.cuda_missing.cache_clear()


def found(report):
    return {finding.part: finding for finding in report.findings}


def statuses(report):
    return {finding.part: finding.status for finding in report.findings if finding.status != "ok"}


def test_a_sound_installation(tiny_bundle):
    report = examine(str(tiny_bundle), intra_op_threads=1)
    assert [finding.part for finding in report.findings] == PARTS
    assert (report.status, report.exit_code, statuses(report)) == ("ok", 0, {})
    parts = found(report)
    assert parts["system"].text.startswith(f"caption-rt {caption_rt.__version__}, Python 3.")
    assert parts["system"].facts["python"] == ".".join(map(str, sys.version_info[:3]))
    packages = parts["packages"].facts
    assert packages["numpy"] == importlib.metadata.version("numpy")
    assert packages["pillow"] == importlib.metadata.version("Pillow")
    assert {"JPEG", "PNG", "WebP", "GIF", "TIFF", "BMP"} <= {
        n for n, readable in packages["formats"].items() if readable
    }
    assert parts["ONNX Runtime"].facts["version"] == onnxruntime.__version__
    assert onnxruntime.__version__ in parts["ONNX Runtime"].facts["installed"].values()
    assert parts["CPU"].facts == {"provider": "CPUExecutionProvider", "works": True}
    assert parts["CUDA"].text.startswith("not used: the NVIDIA driver is not installed")
    assert parts["GPU"].text.startswith("none: the NVIDIA driver is not installed")
    assert parts["threads"].facts["usable"] == threads.usable_cpus()
    assert parts["threads"].facts["intra_op_threads"] == 1
    bundle = parts["bundle"].facts
    assert (bundle["path"], bundle["name"], bundle["format_version"], bundle["words"]) == (
        str(tiny_bundle),
        "tiny",
        1,
        16,
    )
    assert bundle["bytes"] == sum(f.stat().st_size for f in tiny_bundle.iterdir() if f.name != "manifest.json")
    assert sorted(f.name for f in tiny_bundle.iterdir()) == bundle["files"]
    result = parts["self-test"].facts
    assert (result["device"], result["provider"], result["fallback"]) == ("cpu", "CPUExecutionProvider", None)
    assert 0 <= result["max_difference"] <= result["tolerance"]


def test_the_bundle_that_travels_along_is_examined_by_default():
    bundle = found(examine(device="cpu"))["bundle"]
    assert bundle.facts["path"] == str(default_bundle_path())


def test_a_report_is_lines_for_a_person_and_json_for_a_program():
    report = Report(
        (
            Finding("system", "ok", "all is there", facts={"python": "3.11"}),
            Finding("threads", "warning", "too many", "fewer"),
            Finding("bundle", "error", "it is damaged", "get it again", 3),
            Finding("self-test", "error", "no", exit_code=5),
        )
    )
    assert report.lines() == [
        "ok       system        all is there",
        "warning  threads       too many",
        "                       to mend it: fewer",
        "error    bundle        it is damaged",
        "                       to mend it: get it again",
        "error    self-test     no",
    ]
    assert (report.status, report.exit_code) == ("error", 3)
    assert json.loads(json.dumps(report.to_dict())) == {
        "status": "error",
        "exit_code": 3,
        "findings": [
            {"part": "system", "status": "ok", "text": "all is there", "mend": None, "facts": {"python": "3.11"}},
            {"part": "threads", "status": "warning", "text": "too many", "mend": "fewer", "facts": {}},
            {"part": "bundle", "status": "error", "text": "it is damaged", "mend": "get it again", "facts": {}},
            {"part": "self-test", "status": "error", "text": "no", "mend": None, "facts": {}},
        ],
    }


def test_every_report_is_json_and_one_line_a_part(tiny_bundle):
    for report in examine(str(tiny_bundle)), examine("no\nwhere\x1b", "cuda"):
        json.dumps(report.to_dict(), allow_nan=False)
        assert all(line.isprintable() for line in report.lines())
        assert len([line for line in report.lines() if not line.startswith(" ")]) == len(PARTS)


@pytest.mark.parametrize(("device", "count"), [("gpu", None), ("cpu", 0)])
def test_what_cannot_be_meant_is_refused_before_anything_is_examined(monkeypatch, device, count):
    monkeypatch.setattr(doctor, "_system", lambda: pytest.fail("nothing is examined"))
    with pytest.raises(OptionsError):
        examine(device=device, intra_op_threads=count)


def test_no_bundle(tmp_path):
    report = examine(str(tmp_path / "none"), "cpu")
    assert (report.exit_code, statuses(report)) == (3, {"bundle": "error", "self-test": "warning"})
    parts = found(report)
    assert parts["bundle"].text == f"the bundle {tmp_path / 'none'} does not exist: check the path"
    assert "--model" in parts["bundle"].mend
    assert parts["self-test"].text == "not examined: the error is in bundle"


def test_a_damaged_bundle(copy):
    graph = copy / "encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    report = examine(str(copy), "cpu")
    assert (report.exit_code, statuses(report)) == (3, {"bundle": "error", "self-test": "warning"})
    assert "encoder.onnx is damaged or was changed" in found(report)["bundle"].text


def test_a_self_test_that_is_not_passed(copy):
    selftest = json.loads((copy / "selftest.json").read_text())
    selftest["expected"][0]["log_prob"] -= 1
    data = json.dumps(selftest).encode()
    (copy / "selftest.json").write_bytes(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["selftest.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    report = examine(str(copy), "cpu")
    assert (report.exit_code, statuses(report)) == (5, {"self-test": "error"})
    assert "the self-test failed" in found(report)["self-test"].text
    assert found(report)["self-test"].text.endswith(", or export the model again")
    assert found(report)["self-test"].mend is None


def test_a_precision_that_the_bundle_lacks(tiny_bundle):
    report = examine(str(tiny_bundle), "cpu", precision="fp16")
    assert (report.exit_code, statuses(report)) == (2, {"self-test": "error"})
    assert found(report)["self-test"].text.endswith(" has no fp16: it has fp32")
    assert found(report)["self-test"].mend is None


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_that_is_asked_for_in_vain(tiny_bundle, device, capfd):
    report = examine(str(tiny_bundle), device)
    assert (report.exit_code, statuses(report)) == (5, {"CUDA": "error", "self-test": "warning"})
    cuda = found(report)["CUDA"]
    assert cuda.text.startswith(f"cuda:{device[5:] or 0} cannot be used: the NVIDIA driver is not installed")
    assert cuda.mend.startswith("install NVIDIA's driver 580 or newer")
    assert cuda.facts["works"] is False
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def old_driver(monkeypatch):
    monkeypatch.setattr(_cuda, "find_driver", lambda: _cuda.Driver((12, 4), 1))
    monkeypatch.setattr(_cuda, "find_gpus", lambda: (_cuda.Gpu("NVIDIA L4", 24 * 2**30, (8, 9)),))


def test_a_gpu_that_is_there_and_not_used_is_a_warning(tiny_bundle, old_driver):
    report = examine(str(tiny_bundle), "auto")
    assert (report.exit_code, statuses(report)) == (0, {"CUDA": "warning", "self-test": "warning"})
    parts = found(report)
    assert "cuda:0 cannot be used: the NVIDIA driver is too old" in parts["CUDA"].text
    assert parts["CUDA"].mend == "update it to 580 or newer"
    assert parts["GPU"].text == "cuda:0 NVIDIA L4 (24.0 GiB); the driver runs CUDA up to 12.4"
    assert parts["GPU"].facts["gpus"] == [{"name": "NVIDIA L4", "memory": 24 * 2**30, "compute_capability": "8.9"}]
    assert "on the CPU because CUDA cannot be used: the NVIDIA driver is too old" in parts["self-test"].text


def test_who_asks_for_the_cpu_misses_no_gpu(tiny_bundle, old_driver):
    assert statuses(examine(str(tiny_bundle), "cpu")) == {}


def test_a_gpu_whose_sessions_fail_is_a_warning_or_what_was_asked_for(tiny_bundle, old_driver, monkeypatch):
    monkeypatch.setattr(_cuda, "find_driver", lambda: _cuda.Driver((13, 0), 1))
    monkeypatch.setattr(_cuda, "missing_library", lambda version: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    real = onnxruntime.InferenceSession

    def make(model, options, providers, **keywords):
        if providers != ["CPUExecutionProvider"]:
            raise RuntimeError("CUDA failure 35: driver version is insufficient")
        return real(model, options, providers=providers, **keywords)

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    assert statuses(examine(str(tiny_bundle), "auto")) == {"CUDA": "warning", "self-test": "warning"}
    report = examine(str(tiny_bundle), "cuda")
    assert (report.exit_code, statuses(report)) == (5, {"CUDA": "error", "self-test": "warning"})
    assert "cuda:0 does not work: ONNX Runtime" in found(report)["CUDA"].text
    assert "CUDA failure 35" in found(report)["CUDA"].text


def test_two_packages_of_one_name(tiny_bundle, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.31.1" if name.startswith("onnxruntime") else real(name)
    )
    monkeypatch.setattr("caption_rt.devices._DISTRIBUTIONS", ("onnxruntime", "onnxruntime-gpu"))
    report = examine(str(tiny_bundle), "cpu")
    assert (report.exit_code, statuses(report)) == (0, {"ONNX Runtime": "warning"})
    assert "overwritten" in found(report)["ONNX Runtime"].text
    assert found(report)["ONNX Runtime"].mend.startswith("pip uninstall -y onnxruntime onnxruntime-gpu, then ")


def test_more_threads_than_processors(tiny_bundle):
    report = examine(str(tiny_bundle), "cpu", threads.usable_cpus() + 1)
    assert (report.exit_code, statuses(report)) == (0, {"threads": "warning"})
    assert f"--threads {threads.usable_cpus()} or fewer" in found(report)["threads"].mend


def test_a_quota_is_told(tiny_bundle, monkeypatch):
    monkeypatch.setattr(threads, "quota", lambda root=None: 1.5)
    finding = found(examine(str(tiny_bundle), "cpu"))["threads"]
    assert finding.facts["quota"] == 1.5
    assert ", 1.5 by the CPU quota" in finding.text


def test_whatever_a_part_raises_is_its_finding(tiny_bundle, monkeypatch):
    def fail():
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(doctor, "_packages", fail)
    report = examine(str(tiny_bundle), "cpu")
    assert (report.exit_code, statuses(report)) == (5, {"packages": "error", "self-test": "warning"})
    assert found(report)["packages"].text == "ZeroDivisionError: first second"


BROKEN = {
    "onnxruntime": {"ONNX Runtime": "error", "CPU": "warning", "CUDA": "warning", "self-test": "warning"},
    "numpy": {
        "packages": "error",
        "ONNX Runtime": "error",
        "CPU": "warning",
        "CUDA": "warning",
        "self-test": "warning",
    },
    "PIL": {"packages": "error", "self-test": "warning"},
}


@pytest.mark.parametrize("package", BROKEN)
def test_a_broken_package_in_a_real_process(tmp_path, tiny_bundle, package):
    (tmp_path / f"{package}.py").write_text("raise ImportError('libbroken.so: bad ELF')")
    script = (
        "import json, sys\n"
        "from caption_rt.doctor import examine\n"
        "report = examine(sys.argv[1], 'cpu')\n"
        "assert len(report.lines()) > 8\n"
        "json.dump(report.to_dict(), sys.stdout)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, tiny_bundle],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["exit_code"] == 5
    assert {f["part"]: f["status"] for f in report["findings"] if f["status"] != "ok"} == BROKEN[package]
    texts = {f["part"]: f"{f['text']}: {f['mend']}" for f in report["findings"]}
    broken = next(part for part, status in BROKEN[package].items() if status == "error")
    assert "bad ELF" in texts[broken]
    assert "reinstall" in texts[broken]
