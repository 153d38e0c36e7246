"""Optimised graphs in the user's cache: found again, never believed, and done without."""

import os
import shutil
import stat
import sys
import time

import numpy as np
import pytest

from caption_rt import engine, graph_cache
from caption_rt.bundle import Bundle
from caption_rt.engine import Graph
from caption_rt.errors import EngineError
from caption_rt.graph_cache import GraphCache, cache_folder, graph_key

posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(graph_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def load(tiny_bundle, monkeypatch):
    """Load the tiny extractor by way of the cache; counts how often its own bytes were needed."""
    bundle = Bundle.open(tiny_bundle)
    spec = bundle.manifest.precisions["fp32"]["extractor"]
    sha256 = bundle.manifest.files[spec.file].sha256
    read = []

    def load():
        def model():
            read.append(1)
            return bundle.read(spec.file)

        graph = Graph(model, spec, "cpu", sha256=sha256)
        return graph.run(np.full((1, 32, 32, 3), 9, np.uint8))[0], len(read)

    return load


def test_a_graph_is_optimised_once(folder, load):
    first, reads = load()
    (kept,) = folder.iterdir()
    assert reads == 1
    second, reads = load()
    assert reads == 1
    np.testing.assert_array_equal(first, second)
    assert list(folder.iterdir()) == [kept]
    assert sorted(file.name for file in kept.iterdir()) == ["graph.onnx", "weights.bin"]
    if sys.platform != "win32":
        assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(kept.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in kept.iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["graph.onnx", "weights.bin"])
def test_a_changed_byte_is_not_believed(folder, load, name):
    first, _ = load()
    (kept,) = folder.iterdir()
    data = bytearray((kept / name).read_bytes())
    data[len(data) // 2] ^= 1
    (kept / name).write_bytes(data)
    again, reads = load()
    assert reads == 2
    np.testing.assert_array_equal(first, again)
    assert load()[1] == 2  # what was optimised anew took its place
    assert len(list(folder.iterdir())) == 1


def test_one_is_kept_of_those_that_processes_make_at_once(folder):
    """ONNX Runtime writes the same graph in another order each time."""
    cache = GraphCache(folder)
    with cache.writing("key") as first, cache.writing("key") as second:
        first.write_bytes(b"one order")
        second.write_bytes(b"another order")
    kept = cache.find("key")
    assert kept.read_bytes() == b"another order"  # the inner one was done first
    assert list(folder.iterdir()) == [kept.parent]


def test_a_file_that_onnxruntime_refuses_is_thrown_away(folder, load):
    load()
    (kept,) = folder.iterdir()
    key = kept.name.split(".")[0]
    shutil.rmtree(kept)
    with GraphCache(folder).writing(key) as path:
        path.write_bytes(b"no graph")
    assert load()[1] == 2
    assert len(list(folder.iterdir())) == 1


@posix
@pytest.mark.parametrize("spoilt", ["", ".", "graph.onnx", "weights.bin"])
def test_what_others_may_write_is_not_believed(folder, load, spoilt):
    load()
    (kept,) = folder.iterdir()
    (kept / spoilt if spoilt else folder).chmod(0o777)
    assert load()[1] == 2


@posix
@pytest.mark.parametrize("name", ["graph.onnx", "weights.bin"])
def test_a_link_to_what_is_another_users_is_not_believed(folder, load, name):
    load()
    (kept,) = folder.iterdir()
    (kept / name).rename(folder / "moved")
    (folder / "moved").chmod(0o666)
    (kept / name).symlink_to(folder / "moved")
    assert load()[1] == 2


@pytest.mark.parametrize("name", ["graph.onnx", "weights.bin"])
def test_an_empty_file_is_not_believed(folder, load, name):
    load()
    (kept,) = folder.iterdir()
    (kept / name).write_bytes(b"")
    assert load()[1] == 2
    assert load()[1] == 2


@pytest.mark.parametrize("name", ["graph.onnx", "weights.bin"])
def test_half_a_graph_is_not_believed(folder, load, name):
    load()
    (kept,) = folder.iterdir()
    (kept / name).unlink()
    assert load()[1] == 2
    assert load()[1] == 2


@posix
def test_what_is_another_users_is_not_believed(folder, load, monkeypatch):
    load()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert load()[1] == 2


def test_without_a_place_to_write_it_does_without(folder, load):
    folder.parent.joinpath("cache").write_text("a file stands there")
    assert load()[1] == 1
    assert load()[1] == 2
    assert folder.read_text() == "a file stands there"


def test_a_full_disk_costs_nothing_but_the_cache(folder, load, monkeypatch):
    real = engine._new_session

    def full(model, name, device, options):
        if options.optimized_model_filepath:
            raise EngineError("no space left on device")
        return real(model, name, device, options)

    monkeypatch.setattr(engine, "_new_session", full)
    assert load()[0].shape == (1, 6, 5)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("value", ["", "off"])
def test_it_can_be_switched_off(tmp_path, load, monkeypatch, value):
    monkeypatch.setenv(graph_cache.VARIABLE, value)
    assert cache_folder() is None
    assert (load()[1], load()[1]) == (1, 2)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG")
def test_the_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(graph_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "caption-rt" / "graphs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "caption-rt" / "graphs"


def test_the_key_is_all_that_it_depends_on(monkeypatch):
    key = graph_key("a" * 64, "1.31.1")
    assert key == graph_key("a" * 64, "1.31.1")
    others = {graph_key("b" * 64, "1.31.1"), graph_key("a" * 64, "1.31.2")}
    monkeypatch.setattr(graph_cache, "_processor", lambda: "another one")
    others.add(graph_key("a" * 64, "1.31.1"))
    assert len(others | {key}) == 4


def test_what_was_not_used_for_months_goes(folder, load):
    load()
    (kept,) = folder.iterdir()
    old = folder / f"{'0' * 32}.{'1' * 8}.graph", folder / f".{'0' * 32}.{'1' * 8}.tmp"
    for unused in old:
        unused.mkdir()
        (unused / "graph.onnx").write_bytes(b"old")
        os.utime(unused, (0, time.time() - 61 * 86400))
    (folder / "others.graph").write_bytes(b"not ours")
    shutil.rmtree(kept)
    load()
    assert sorted(folder.iterdir()) == [kept, folder / "others.graph"]


def test_only_graphs_of_some_size_are_kept(folder, tiny_bundle, monkeypatch):
    engine.Engine(Bundle.open(tiny_bundle), "cpu")
    assert not folder.exists()
    monkeypatch.setattr(graph_cache, "LEAST_SIZE", 0)
    engine.Engine(Bundle.open(tiny_bundle), "cpu")
    assert len(list(folder.iterdir())) == 3
