"""Captioner on the tiny bundle, against the same network in NumPy."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from caption_rt import (
    Bundle,
    BundleError,
    Caption,
    Captioner,
    DecodeOptions,
    EngineError,
    ImageError,
    OptionsError,
    PhotoLimits,
    sessions,
)
from caption_rt.image import read_photo
from caption_rt.selftest import SelfTest
from caption_rt.threads import usable_cpus
from processes import caption_of

UNGUARDED = DecodeOptions(max_words=8, guard=False)


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
        caption = captioner.caption(path, DecodeOptions(max_words=max_words, guard=False))
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
    assert {captioner.caption(path, UNGUARDED).ended for path in photos} == {"end", "max_words"}


def test_the_bundles_own_options_hold_unless_others_are_given(captioner, photos):
    assert captioner.default_options == DecodeOptions(beam_size=1, length_penalty=0.0, max_words=8)
    assert len(captioner.caption(photos[1], replace(captioner.default_options, guard=False)).words) == 8
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

    captions = captioner.caption_many(endless(), UNGUARDED, batch_size=3)
    assert taken == []
    for count in range(1, 10):
        assert next(captions).words[0] == "dog"
        # The batch that is being given, and at most one more ahead with a photo a reader.
        assert len(taken) <= 3 * ((count + 2) // 3) + 3 + usable_cpus()
    captions.close()


def test_a_bad_photo_raises_after_the_captions_before_it(captioner, photos, tmp_path):
    missing = tmp_path / "missing.jpg"
    results = captioner.caption_many([photos[0], photos[1], missing, photos[2]], UNGUARDED, batch_size=2)
    assert [next(results).words[0], next(results).words[0]] == ["grass", "dog"]
    with pytest.raises(ImageError, match="does not exist"):
        next(results)
    alone = captioner.caption_many([photos[0], missing], UNGUARDED, batch_size=16)
    assert next(alone).words[0] == "grass"
    with pytest.raises(ImageError, match="does not exist"):
        next(alone)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_a_bad_photo_may_cost_its_own_place_alone(captioner, photos, tmp_path, batch_size):
    (tmp_path / "text.jpg").write_text("not a photo")
    images = [tmp_path / "missing", photos[0], tmp_path / "text.jpg", tmp_path, photos[1]]
    results = list(captioner.caption_many(images, UNGUARDED, batch_size, on_error="return"))
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
        "strategy": "greedy",
        "retried_for": [],
        "faults": [],
        "provider": "CPUExecutionProvider",
    }
    with_timing = caption.to_dict(timing=True)
    assert set(with_timing.pop("timing")) == {"read_s", "extract_s", "encode_s", "decode_s"}
    assert with_timing == values
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


def run_out(words):
    """The words of a generator, and the value that it returns."""
    given = []
    while True:
        try:
            given.append(next(words))
        except StopIteration as stop:
            return given, stop.value


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_words=12),
        DecodeOptions(max_words=12, beam_size=4, n_best=2),
        DecodeOptions(max_words=12, sample=True, seed=3),
    ],
    ids=lambda options: options.strategy,
)
def test_streamed_words_are_those_of_the_caption(captioner, photos, options):
    for photo in photos:
        words, caption = run_out(captioner.stream(photo, options))
        unguarded = replace(options, guard=False)
        assert caption == captioner.caption(photo, unguarded)
        assert caption.alternatives == captioner.caption(photo, unguarded).alternatives
        assert tuple(word.text for word in words) == caption.words
        assert tuple(word.token for word in words) == caption.tokens
        assert tuple(word.log_prob for word in words) == caption.word_log_probs
        for word, attention in zip(words, caption.attention, strict=True):
            np.testing.assert_array_equal(word.attention, attention)
            assert not word.attention.flags.writeable


def test_words_come_before_the_caption_is_finished(captioner, photos, monkeypatch):
    steps = []
    step = sessions.EngineStepper.step
    monkeypatch.setattr(sessions.EngineStepper, "step", lambda self, *a: steps.append(1) or step(self, *a))
    for count, word in enumerate(captioner.stream(photos[0], DecodeOptions(max_words=8)), start=1):
        assert len(steps) == count
        assert word.text
    with pytest.raises(ImageError, match="does not exist"):
        next(captioner.stream("missing.jpg"))


def test_the_guard_says_that_it_decoded_again(captioner, photos):
    asked = captioner.caption(photos[0], DecodeOptions(max_words=8, guard=False))
    assert asked.text == "grass runs grass ball cat runs cat cat"
    assert (asked.strategy, asked.retried_for, asked.faults) == ("greedy", (), ("repetition",))
    better = captioner.caption(photos[0], DecodeOptions(max_words=8))
    # A beam says "cat cat" still, so the best of ten samples is taken.
    beam = captioner.caption(photos[0], DecodeOptions(max_words=8, beam_size=5, no_repeat_ngram=2, guard=False))
    assert beam.faults == ("repetition",)
    assert (better.strategy, better.retried_for, better.faults) == ("sample", ("repetition",), ())
    samples = DecodeOptions(max_words=8, sample=True, n_best=10, temperature=0.7, no_repeat_ngram=2, guard=False)
    assert better.text == captioner.caption(photos[0], samples).text
    assert better.alternatives == ()


def test_words_may_be_banned_and_unk_asked_for(captioner, photos):
    free = captioner.caption(photos[2], DecodeOptions(guard=False))
    assert "dog" in free.words
    banned = captioner.caption(photos[2], DecodeOptions(banned_words=["DOG", "whisky"], max_words=30, guard=False))
    assert "dog" not in banned.words
    said = {
        word
        for photo in photos
        for seed in range(20)
        for word in captioner.caption(
            photo, DecodeOptions(sample=True, seed=seed, allow_unk=True, temperature=3.0, guard=False)
        ).words
    }
    assert "<unk>" in said
    assert not {"<pad>", "<start>", "<end>"} & said


def test_n_best_are_alternatives(captioner, photos):
    options = DecodeOptions(beam_size=4, n_best=3, max_words=12, guard=False)
    for photo in photos:
        caption = captioner.caption(photo, options)
        found = [caption, *caption.alternatives]
        assert len(found) == 3
        assert len({c.tokens for c in found}) == 3
        assert [c.log_prob for c in found] == sorted((c.log_prob for c in found), reverse=True)
        assert all(c.alternatives == () for c in caption.alternatives)
        listed = json.loads(json.dumps(caption.to_dict()))["alternatives"]
        assert [other["caption"] for other in listed] == [c.text for c in caption.alternatives]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_same_seed_gives_the_same_samples_at_every_batch_size(captioner, photos, batch_size):
    options = DecodeOptions(sample=True, seed=11, max_words=12)
    alone = {photo: captioner.caption(photo, options).tokens for photo in photos}
    shuffled = [photos[2], photos[0], photos[1], photos[0], photos[2]]
    for photo, caption in zip(shuffled, captioner.caption_many(shuffled, options, batch_size), strict=True):
        assert caption.tokens == alone[photo]
    assert len(set(alone.values())) == 3
    others = [captioner.caption(photo, replace(options, seed=12)).tokens for photo in photos]
    assert others != list(alone.values())


def test_timing_adds_up(captioner, photos):
    start = time.perf_counter()
    captions = list(captioner.caption_many(photos * 4, batch_size=4))
    seconds = time.perf_counter() - start
    for caption in captions:
        assert min(vars(caption.timing).values()) > 0
    network = sum(c.timing.extract_s + c.timing.encode_s + c.timing.decode_s for c in captions)
    assert 0 < network < seconds
    assert captioner.caption_pixels([np.zeros((32, 32, 3), np.uint8)])[0].timing.read_s == 0


def test_open_images_may_be_closed_by_their_generator(captioner, photos):
    """Photos are read ahead by threads, but an open image only as long as it is surely open."""

    def opened():
        for photo in photos * 3:
            with Image.open(photo) as image:
                yield image

    texts = [caption.text for caption in captioner.caption_many(opened(), batch_size=4)]
    assert texts == [captioner.caption(Image.open(photo)).text for photo in photos] * 3


def test_captioners_of_one_bundle_share_their_sessions(tiny_bundle, photos):
    first, second = Captioner.load(tiny_bundle, "cpu"), Captioner.load(Bundle.open(tiny_bundle), "cpu")
    assert first._use_engine() is second._use_engine()
    assert Captioner.load(tiny_bundle, "cpu", intra_op_threads=1)._use_engine() is not first._use_engine()
    first.close()
    assert second.caption(photos[2]).text == "in dog cat ball cat"


def test_a_closed_captioner_says_so(tiny_bundle, photos):
    with Captioner.load(tiny_bundle, "cpu", intra_op_threads=2) as captioner:
        engine = weakref.ref(captioner._use_engine())
        assert captioner.caption(photos[2]).words
    assert engine() is None
    captioner.close()
    for use in (captioner.caption, lambda photo: next(captioner.stream(photo)), lambda _: captioner.provider):
        with pytest.raises(EngineError, match="the captioner is closed: load another one"):
            use(photos[2])


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_captioner_goes_to_other_processes(captioner, photos, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    expected = captioner.caption(photos[2])
    context = multiprocessing.get_context(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            results = list(pool.map(caption_of, [captioner] * 4, [photos[2]] * 4, timeout=60))
    for process, caption in results:
        assert process != os.getpid()
        assert caption == expected
        np.testing.assert_array_equal(caption.attention, expected.attention)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_captioner_survives_a_fork(captioner, photos):
    """A child that uses it gets sessions of its own.

    It ends as multiprocessing ends its children: with ONNX Runtime 1.31 imported, a forked process hangs at a plain
    exit, caption-rt or not.
    """
    script = (
        "import os, sys\n"
        "from caption_rt import Captioner\n"
        "captioner = Captioner.load(sys.argv[1], 'cpu', intra_op_threads=2)\n"
        "captioner.caption(sys.argv[2])\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    print(captioner.caption(sys.argv[2]).text, flush=True)\n"
        "    del captioner\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "print(captioner.caption(sys.argv[2]).text)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, captioner.bundle.path, photos[2]],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"{captioner.caption(photos[2]).text}\n" * 2


def test_pickle_takes_the_configuration_alone(copy, photos, tiny_bundle, monkeypatch):
    captioner = Captioner.load(copy, "cpu", intra_op_threads=1, limits=PhotoLimits(max_pixels=10**6))
    data = pickle.dumps(captioner)
    assert len(data) < 1000
    revived = pickle.loads(data)
    assert revived._engine is None
    assert revived.caption(photos[2]) == captioner.caption(photos[2])
    assert (revived.bundle.path, revived.limits, revived.intra_op_threads) == (copy, captioner.limits, 1)
    change_file(copy, "manifest.json", lambda manifest: manifest.update(description="another"))
    with pytest.raises(BundleError, match="has changed since the captioner was pickled"):
        pickle.loads(data)
    # The default bundle is found where the package lies.
    monkeypatch.setattr("caption_rt.captioner.default_bundle_path", lambda: tiny_bundle)
    assert os.fsencode(tiny_bundle) not in pickle.dumps(Captioner.load(tiny_bundle, "cpu"))


def test_many_threads_share_a_captioner(captioner, photos):
    expected = [captioner.caption(photo).tokens for photo in photos]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: captioner.caption(photos[i % 3]).tokens, range(120)))
    assert found == expected * 40


def test_the_library_prints_nothing_and_installs_no_handlers(tiny_bundle, photos):
    script = (
        "import logging, sys\n"
        "from caption_rt import Captioner, DecodeOptions\n"
        "before = logging.root.handlers[:]\n"
        "with Captioner.load(sys.argv[1]) as captioner:\n"
        "    list(captioner.caption_many(sys.argv[2:] + ['missing.jpg'], on_error='return'))\n"
        "    list(captioner.stream(sys.argv[2], DecodeOptions(sample=True)))\n"
        "assert logging.root.handlers == before\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_bundle, *photos], env=environment, capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.data
@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_words=30),
        DecodeOptions(max_words=30, beam_size=3),
        DecodeOptions(max_words=30, sample=True, seed=1),
    ],
    ids=lambda options: options.strategy,
)
def test_real_photos_get_the_same_captions_in_any_batch(shared, options):
    """What docs/embedding.md guarantees: the same tokens, and log-probabilities within 1e-4."""
    photos = sorted((shared / "photos" / "images").iterdir()) + sorted((shared / "flickr8k" / "images").iterdir())[:70]
    with Captioner.load(device="cpu") as captioner:
        alone = list(captioner.caption_many(photos, options, 1))
        for batch_size, order in ((16, 1), (7, -1), (100, 1)):
            together = list(captioner.caption_many(photos[::order], options, batch_size))[::order]
            for one, other in zip(alone, together, strict=True):
                assert one.tokens == other.tokens
                assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
                assert one.word_log_probs == pytest.approx(other.word_log_probs, abs=1e-4)
                np.testing.assert_allclose(one.attention, other.attention, atol=1e-4)
    assert len({caption.text for caption in alone}) > 50
