"""Bundles in several precisions: which is used, where it is said, and what the self-test compares."""

import dataclasses
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from caption_rt.bundle import Bundle, write_bundle
from caption_rt.captioner import Captioner
from caption_rt.doctor import examine
from caption_rt.engine import multiplies_exactly
from caption_rt.errors import BundleError, EngineError, OptionsError
from caption_rt.selftest import forced_log_probs
from caption_rt.sessions import EngineStepper
from running import caption_rt

TOLERANCE = 0.75


def spoilt(data, factor):
    """A decoder whose output layer is multiplied: what it says changes, as fewer bits would change it."""
    model = onnx.load_model_from_string(data)
    (out,) = (tensor for tensor in model.graph.initializer if tensor.name == "out")
    out.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(out) * np.float32(factor)), "out"))
    return model.SerializeToString()


def in_two(tiny_bundle, folder, factor=1.02, **selftest):
    """The tiny bundle with an int8 of which only the decoder is another."""
    bundle = Bundle.open(tiny_bundle)
    manifest, fp32 = bundle.manifest, bundle.manifest.precisions["fp32"]
    contents = {name: bundle.read(name) for name in manifest.files}
    contents["decoder-int8.onnx"] = spoilt(contents["decoder.onnx"], factor)
    record = json.loads(contents["selftest.json"])
    record["tolerance"].update({"int8_word_log_prob": TOLERANCE, **selftest})
    contents["selftest.json"] = json.dumps(record).encode()
    int8 = {**fp32, "decoder": dataclasses.replace(fp32["decoder"], file="decoder-int8.onnx")}
    kept = ("name", "description", "license", "image", "grid", "recurrence", "special_ids", "decoding")
    facts = {name: getattr(manifest, name) for name in (*kept, "training", "scores", "versions")}
    return write_bundle(folder, **facts, precisions={"fp32": fp32, "int8": int8}, contents=contents)


@pytest.fixture(scope="module")
def two(tiny_bundle, tmp_path_factory):
    return in_two(tiny_bundle, tmp_path_factory.mktemp("two") / "two")


def processor(monkeypatch, exact):
    """A processor with VNNI, or without."""
    monkeypatch.setattr("caption_rt.engine.multiplies_exactly", lambda: exact)


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-x86_64 (Debian: qemu-user) is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates an x86 processor by this one's programs")
def test_a_processor_that_does_not_multiply_exactly_is_found_out():
    """A Haswell, which has AVX2 and no VNNI, and what this processor says of itself."""
    code = "from caption_rt.engine import multiplies_exactly; print(multiplies_exactly())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", code]
    emulated = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert emulated.stdout.strip() == "False"
    flags = Path("/proc/cpuinfo").read_text().split()
    assert multiplies_exactly() is ("avx512_vnni" in flags or "avx_vnni" in flags)


def test_a_cpu_that_does_not_multiply_exactly_takes_fp32(two, tiny_bundle, photos, tmp_path, monkeypatch):
    processor(monkeypatch, exact=False)
    assert Captioner.load(two, "cpu").precision == "fp32"
    assert Captioner.load(two, "cpu", precision="int8").precision == "int8"
    status = {finding.part: finding.status for finding in examine(str(two.path), "cpu").findings}
    assert status["self-test"] == "ok"
    found = {finding.part: finding for finding in examine(str(two.path), "cpu", precision="int8").findings}["self-test"]
    assert (found.status, found.exit_code) == ("warning", 0)
    assert found.text.endswith("; this processor cannot sum products of 8 bits exactly: captions may be worse")
    assert found.mend == "take another precision with --precision, or a bundle exported with --reduce-range"


def test_a_cpu_takes_int8_where_nothing_else_is_asked_for(two, tiny_bundle, photos, monkeypatch):
    processor(monkeypatch, exact=True)
    captioner = Captioner.load(two, "cpu")
    caption = captioner.caption(photos[2])
    assert (captioner.precision, caption.precision, caption.to_dict()["precision"]) == ("int8", "int8", "int8")
    asked = Captioner.load(two, "cpu", precision="fp32")
    only = Captioner.load(tiny_bundle, "cpu")
    assert (asked.precision, only.precision) == ("fp32", "fp32")
    assert asked.caption(photos[2]) == only.caption(photos[2])
    assert asked.caption(photos[2]).log_prob != caption.log_prob


def test_a_precision_that_is_not_there_is_refused_with_those_that_are(two):
    with pytest.raises(OptionsError, match=r"has no fp16: it has fp32 and int8$"):
        Captioner.load(two, "cpu", precision="fp16")
    with pytest.raises(OptionsError, match=r"^the precision is one of fp32, fp16, int8, not 'fp8'$"):
        Captioner.load(two, "cpu", precision="fp8")
    with pytest.raises(OptionsError, match=r"^the precision is one of fp32, fp16, int8, not \[\]$"):
        Captioner.load(two, "cpu", precision=[])


def test_a_pickled_captioner_keeps_its_precision(two):
    assert pickle.loads(pickle.dumps(Captioner.load(two, "cpu", precision="fp32"))).precision == "fp32"


def test_the_self_test_of_fewer_bits_compares_the_makers_words(two):
    result = Captioner.load(two, "cpu", precision="int8").self_test()
    assert (result.precision, result.tolerance) == ("int8", TOLERANCE)
    assert 0.001 < result.max_difference < TOLERANCE
    assert Captioner.load(two, "cpu", precision="fp32").self_test().max_difference < 0.001


def test_the_self_test_of_fewer_bits_can_fail(tiny_bundle, tmp_path):
    with pytest.raises(EngineError, match=r"is 0\.\d+ off, and 1e-05 is allowed \(CPUExecutionProvider, int8\)"):
        Captioner.load(
            in_two(tiny_bundle, tmp_path / "a", int8_word_log_prob=1e-5), "cpu", precision="int8"
        ).self_test()
    bundle = in_two(tiny_bundle, tmp_path / "b", int8_word_log_prob="much")
    with pytest.raises(BundleError, match="int8_word_log_prob is not a number"):
        Captioner.load(bundle, "cpu", precision="int8").self_test()


def test_forced_words_get_the_log_probabilities_of_a_search(tiny_bundle, photos):
    captioner = Captioner.load(tiny_bundle, "cpu")
    caption = captioner.caption(photos[2])
    pixels, _ = captioner._read(photos[2])
    stepper = EngineStepper(captioner._use_engine(), [pixels])
    forced = forced_log_probs(stepper, caption.tokens, captioner.bundle.vocabulary.start_id)
    np.testing.assert_allclose(forced, caption.word_log_probs, atol=1e-6)


def test_doctor_and_the_command_say_which_it_was(two, photos, tmp_path):
    facts = {finding.part: finding.facts for finding in examine(str(two.path), "cpu").findings}
    best = "int8" if multiplies_exactly() else "fp32"
    assert (facts["bundle"]["precisions"], facts["self-test"]["precision"]) == (["fp32", "int8"], best)
    output = tmp_path / "out.jsonl"
    arguments = ("--model", two.path, photos[2], "-o", output)
    assert caption_rt(*arguments, "--precision", "fp32").returncode == 0
    assert json.loads(output.read_text())["precision"] == "fp32"
    # Another precision is another run: the photo is captioned anew.
    assert caption_rt(*arguments, "--precision", "int8").returncode == 0
    assert json.loads(output.read_text().splitlines()[-1])["precision"] == "int8"
    refused = caption_rt(*arguments, "--precision", "fp16")
    assert (refused.returncode, "has no fp16: it has fp32 and int8" in refused.stderr) == (2, True)
