"""The self-test of a bundle: what passes, what fails, and what cannot be read."""

import pytest

from bundles import change_file
from caption_rt import BundleError, Captioner, EngineError
from caption_rt.selftest import SelfTest


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
        (lambda data: data["inputs"][0].update(png_base64="%"), "inputs[0]: png_base64 is not base64"),
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
