"""Captioner on the tiny bundle, against the same network in NumPy."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from caption_rt import Bundle, BundleError, Caption, Captioner, DecodeOptions, EngineError, ImageError, OptionsError
from caption_rt.captioner import SelfTest
from caption_rt.image import read_photo


@pytest.fixture(scope="module")
def captioner(tiny_bundle):
    return Captioner.load(tiny_bundle, "cpu")


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def change_file(folder, name, change):
    """Change a JSON file of a bundle, and its manifest with it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = manifest if name == "manifest.json" else json.loads((folder / name).read_text())
    change(data)
    if name != "manifest.json":
        text = json.dumps(data).encode()
        (folder / name).write_bytes(text)
        manifest["files"][name] = {"sha256": hashlib.sha256(text).hexdigest(), "size": len(text)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("max_words", [1, 3, 8, 12])
def test_greedy_captions_are_those_of_the_network_in_numpy(captioner, tiny, photos, max_words):
    network = tiny.Network()
    for path in photos:
        caption = captioner.caption(path, DecodeOptions(max_words=max_words))
        expected = network.greedy(read_photo(path, tiny.SIZE), max_words)
        assert caption.tokens == tuple(expected["token_ids"])
        assert caption.words == tuple(tiny.WORDS[token] for token in caption.tokens)
        assert caption.text == " ".join(caption.words)
        assert caption.log_prob == pytest.approx(expected["log_prob"], abs=1e-4)
        assert caption.word_log_probs == pytest.approx(expected["word_log_probs"], abs=1e-4)
        assert caption.ended == ("end" if expected["ended"] else "max_words")
        assert caption.attention.dtype == np.float32
        np.testing.assert_allclose(
            caption.attention, expected["attention"].reshape(-1, tiny.ROWS, tiny.COLUMNS), atol=1e-5
        )
        np.testing.assert_allclose(caption.attention.sum(axis=(1, 2)), 1, atol=1e-5)
        assert caption.provider == captioner.provider == "CPUExecutionProvider"


def test_some_captions_end_and_some_are_cut(captioner, photos):
    """The test above would show little if all ended the same way."""
    assert {captioner.caption(path).ended for path in photos} == {"end", "max_words"}


def test_the_bundles_own_options_hold_unless_others_are_given(captioner, photos):
    assert captioner.default_options == DecodeOptions(beam_size=1, length_penalty=0.0, max_words=8)
    assert len(captioner.caption(photos[0]).words) == 8
    assert len(captioner.caption(photos[0], DecodeOptions(max_words=2)).words) == 2


def test_path_bytes_image_and_array_give_the_same_caption(captioner, photos, tmp_path):
    for photo in photos:
        # So small that the JPEG is decoded whole, as a PIL image or an array always is.
        path = tmp_path / photo.name
        Image.open(photo).resize((120, 90)).save(path)
        sources = [path, str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))]
        captions = [captioner.caption(source) for source in sources]
        assert [caption.tokens for caption in captions] == [captions[0].tokens] * 5
        assert len({caption.log_prob for caption in captions}) == 1


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_caption_does_not_depend_on_its_batch(captioner, photos, batch_size, beam_size):
    options = DecodeOptions(beam_size=beam_size, max_words=10)
    many = list(captioner.caption_many(photos * 3, options, batch_size))
    assert len(many) == 9
    for path, caption in zip(photos * 3, many, strict=True):
        alone = captioner.caption(path, options)
        assert caption.tokens == alone.tokens
        assert caption.log_prob == pytest.approx(alone.log_prob, abs=1e-5)
        np.testing.assert_allclose(caption.attention, alone.attention, atol=1e-6)


def test_a_beam_finds_captions_at_least_as_likely(captioner, photos):
    better = 0
    for path in photos:
        greedy = captioner.caption(path, DecodeOptions(max_words=12))
        beam = captioner.caption(path, DecodeOptions(beam_size=8, max_words=12))
        assert beam.log_prob >= greedy.log_prob
        better += beam.log_prob > greedy.log_prob + 0.1
    assert better > 0


def test_unknown_and_other_special_words_are_never_said(captioner, photos):
    for path in photos:
        words = captioner.caption(path, DecodeOptions(beam_size=5, max_words=30)).words
        assert not {"<pad>", "<unk>", "<start>", "<end>"} & set(words)


def test_photos_are_read_as_they_are_needed(captioner, photos):
    taken = []

    def endless():
        while True:
            taken.append(photos[1])
            yield photos[1]

    captions = captioner.caption_many(endless(), batch_size=3)
    assert taken == []
    assert next(captions).words[0] == "dog"
    assert len(taken) == 3


def test_a_bad_photo_raises_after_the_captions_before_it(captioner, photos, tmp_path):
    missing = tmp_path / "missing.jpg"
    results = captioner.caption_many([photos[0], photos[1], missing, photos[2]], batch_size=2)
    assert [next(results).words[0], next(results).words[0]] == ["grass", "dog"]
    with pytest.raises(ImageError, match="does not exist"):
        next(results)
    alone = captioner.caption_many([photos[0], missing], batch_size=16)
    assert next(alone).words[0] == "grass"
    with pytest.raises(ImageError, match="does not exist"):
        next(alone)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_a_bad_photo_may_cost_its_own_place_alone(captioner, photos, tmp_path, batch_size):
    (tmp_path / "text.jpg").write_text("not a photo")
    images = [tmp_path / "missing", photos[0], tmp_path / "text.jpg", tmp_path, photos[1]]
    results = list(captioner.caption_many(images, batch_size=batch_size, on_error="return"))
    assert [type(result) for result in results] == [ImageError, Caption, ImageError, ImageError, Caption]
    assert [str(results[i]).split(": ")[-1].split(" ")[0] for i in (0, 3)] == ["check", "name"]
    assert (results[1].words[0], results[4].words[0]) == ("grass", "dog")


def test_wrong_arguments_are_refused_at_once(captioner):
    with pytest.raises(OptionsError, match="batch_size must be at least 1, not 0"):
        captioner.caption_many([], batch_size=0)
    with pytest.raises(OptionsError, match='on_error is "raise" or "return", not '):
        captioner.caption_many([], on_error="ignore")
    for one in ("photo.jpg", b"data"):
        with pytest.raises(OptionsError, match="caption_many takes several photos: give a list"):
            captioner.caption_many(one)
    assert list(captioner.caption_many([])) == []


def test_a_caption_is_a_value(captioner, photos):
    first, second = captioner.caption(photos[0]), captioner.caption(photos[0])
    assert first == second
    assert len({first, second}) == 1
    with pytest.raises(ValueError, match="read-only"):
        first.attention[0, 0, 0] = 1
    assert "attention" not in repr(first)


def test_a_caption_as_json(captioner, photos):
    caption = captioner.caption(photos[2])
    values = json.loads(json.dumps(caption.to_dict()))
    assert values == {
        "caption": "in dog cat ball cat",
        "log_prob": caption.log_prob,
        "words": ["in", "dog", "cat", "ball", "cat"],
        "word_log_probs": list(caption.word_log_probs),
        "tokens": [15, 3, 2, 14, 2],
        "ended": "end",
        "provider": "CPUExecutionProvider",
    }
    with_attention = json.loads(json.dumps(caption.to_dict(attention=True)))
    np.testing.assert_array_equal(np.array(with_attention.pop("attention"), np.float32), caption.attention)
    assert with_attention == values


def test_the_self_test_passes_with_results_that_another_program_made(captioner):
    result = captioner.self_test()
    assert result == SelfTest(2, "CPUExecutionProvider", result.max_difference, 1e-3)
    assert 0 <= result.max_difference < 1e-5
    assert captioner.self_test() == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["expected"][1]["token_ids"].append(3), "for board the token ids [0] came instead of [0, 3]"),
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
    assert "selftest.json: " in str(caught.value)
    assert message in str(caught.value)


def test_decoding_defaults_out_of_range_are_the_bundles_fault(copy):
    change_file(copy, "manifest.json", lambda data: data["decoding"].update(beam_size=100_000))
    with pytest.raises(BundleError, match="decoding: beam_size must be a whole number from 1 to 1000"):
        Captioner.load(copy, "cpu")


def test_load_takes_a_path_or_an_open_bundle(tiny_bundle, photos, captioner):
    for bundle in (str(tiny_bundle), tiny_bundle, Bundle.open(tiny_bundle)):
        loaded = Captioner.load(bundle, "cpu", intra_op_threads=1)
        assert loaded.caption(photos[2]).text == captioner.caption(photos[2]).text
        assert loaded.bundle.manifest.name == "tiny"


def test_load_takes_the_default_bundle(tiny_bundle, monkeypatch):
    monkeypatch.setattr("caption_rt.captioner.default_bundle_path", lambda: tiny_bundle)
    assert Captioner.load(device="cpu").bundle.path == tiny_bundle


def test_one_bundle_serves_several_captioners(tiny_bundle, photos):
    bundle = Bundle.open(tiny_bundle)
    first, second = Captioner.load(bundle, "cpu"), Captioner.load(bundle, "cpu")
    assert first.caption(photos[0]) == second.caption(photos[0])
