"""A captioner from its loading to its closing: shared, pickled, forked, in threads, silent."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bundles import change_file
from caption_rt import Bundle, BundleError, Captioner, EngineError, PhotoLimits
from processes import caption_of


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


@pytest.mark.parametrize("zipped", [False, True])
def test_a_relative_path_holds_where_the_working_folder_changes(copy, photos, monkeypatch, tmp_path, zipped):
    monkeypatch.chdir(tmp_path)
    if zipped:
        shutil.make_archive("copy", "zip", copy)
    captioner = Captioner.load("copy.zip" if zipped else "copy", "cpu")
    monkeypatch.chdir("/")
    assert captioner.self_test().photos == captioner.self_test().photos == 2
    revived = pickle.loads(pickle.dumps(captioner))
    assert revived.caption(photos[0]).text == captioner.caption(photos[0]).text
    assert captioner.bundle.path == Path("copy.zip" if zipped else "copy")


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
