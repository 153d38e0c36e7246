"""The self-test of a bundle: what passes, what fails, and what cannot be read."""

import dataclasses
import math

import pytest

from bundles import change_file
from caption_rt import BundleError, Captioner, EngineError
from caption_rt.command_options import OPTION_NAMES
from caption_rt.engine import version
from caption_rt.selftest import SelfTest, run_self_test


def test_the_self_test_passes_with_results_that_another_program_made(captioner):
    result = captioner.self_test()
    assert result == SelfTest(2, "CPUExecutionProvider", "fp32", result.max_difference, 1e-3)
    assert 0 <= result.max_difference < 1e-5
    assert captioner.self_test() == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["expected"][1].update(token_ids=[0, 3], word_log_probs=[-1.0, -1.0]),
            "for board the token ids [0] came instead of [0, 3]",
        ),
        (lambda data: data["expected"][0].update(log_prob=-20.0), "a log-probability of slope is "),
        (lambda data: data["expected"][0]["word_log_probs"].__setitem__(0, -9.0), "and 0.001 is allowed"),
    ],
)
def test_a_self_test_with_another_result_fails(copy, change, message):
    change_file(copy, "selftest.json", change)
    with pytest.raises(EngineError) as caught:
        Captioner.load(copy, "cpu").self_test()
    assert str(caught.value).startswith("the self-test failed: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith(
        f" (CPUExecutionProvider, fp32): install another version of ONNX Runtime (here is {version()}), or export the "
        "model again"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("tolerance"), "the key tolerance is missing"),
        (lambda data: data["options"].pop("max_words"), "the key max_words is missing"),
        (lambda data: data["inputs"].clear(), "0 inputs and 2 expected results"),
        (lambda data: data["expected"].pop(), "2 inputs and 1 expected results"),
        (lambda data: data["expected"][0].update(log_prob="low"), "expected[0]: log_prob is not a number"),
        (lambda data: data["expected"][0].update(log_prob=10**400), "expected[0]: log_prob is not a number"),
        (lambda data: data["expected"][0]["word_log_probs"].pop(), "word_log_probs has 7 numbers for 8 token ids"),
        *(
            (lambda data, bad=bad: data["expected"][0]["token_ids"].__setitem__(0, bad), "token_ids has others than")
            for bad in (99999, -5000, 10**30)
        ),
        (lambda data: data["inputs"][0].update(png_base64="%"), "inputs[0]: png_base64 is not base64"),
        (lambda data: data["inputs"][0].update(png_base64="é"), "inputs[0]: png_base64 is not base64"),
        (lambda data: data["inputs"][0].update(png_base64="AAAA"), "inputs[0]: png_base64 is not a photo"),
        (lambda data: data["options"].update(beam_size=5000), "options: beam_size must be"),
    ],
)
def test_a_self_test_that_cannot_be_read_is_a_bundle_error(copy, change, message):
    change_file(copy, "selftest.json", change)
    with pytest.raises(BundleError) as caught:
        Captioner.load(copy, "cpu").self_test()
    assert str(caught.value).startswith(f"the bundle {copy}: selftest.json: ")
    assert str(caught.value).endswith("; copy it again from its source, or export the model again")
    assert message in str(caught.value)


def test_decoding_defaults_out_of_range_are_the_bundles_fault(copy):
    change_file(copy, "manifest.json", lambda data: data["decoding"].update(beam_size=100_000))
    with pytest.raises(BundleError, match="decoding: beam_size must be a whole number from 1 to 1000"):
        Captioner.load(copy, "cpu")


@pytest.mark.parametrize("where", [0, 1])
def test_a_log_probability_that_is_not_a_number_fails(bundle, captioner, where):
    def caption(pixels, options):
        (found,) = captioner.caption_pixels(pixels, options)
        numbers = list(found.word_log_probs)
        numbers[where] = math.nan
        return [dataclasses.replace(found, word_log_probs=tuple(numbers))]

    with pytest.raises(EngineError, match=r"is nan off, and 0\.001 is allowed"):
        run_self_test(bundle, "fp32", caption, None)


@pytest.mark.parametrize(
    ("provider", "precision", "exact", "end"),
    [
        (
            "CUDAExecutionProvider",
            "fp16",
            True,
            "try device cpu; if that passes, update NVIDIA's driver and onnxruntime-gpu",
        ),
        (
            "CPUExecutionProvider",
            "int8",
            False,
            "this processor does not sum products of 8 bits exactly, so choose another precision, or a bundle exported "
            "with --reduce-range",
        ),
        ("CPUExecutionProvider", "int8", True, "try precision fp32; if that fails too, install another version of "),
    ],
)
def test_what_to_do_depends_on_the_device_and_the_precision(
    bundle, captioner, monkeypatch, provider, precision, exact, end
):
    monkeypatch.setattr("caption_rt.engine.multiplies_exactly", lambda: exact)

    def caption(pixels, options):
        (found,) = captioner.caption_pixels(pixels, options)
        return [dataclasses.replace(found, provider=provider, precision=precision, log_prob=0.0)]

    with pytest.raises(EngineError) as caught:
        run_self_test(bundle, "fp32", caption, None)
    sentence = str(caught.value)
    assert f"is allowed ({provider}, {precision}): {end}" in sentence
    said = str(caught.value.renamed(OPTION_NAMES))
    assert said == sentence.replace("try ", "try --").replace("another precision", "another --precision")
