"""What libraries print is not ours to print."""

import contextlib
import sys
import threading

from caption_rt import _cuda


def test_only_the_calling_threads_prints_are_diverted(capsys, caplog):
    def noisy():
        print("Failed to load libcudart.so.13")
        other = threading.Thread(target=lambda: print("a result of another thread"))
        other.start()
        other.join()

    with caplog.at_level("INFO", "caption_rt"):
        _cuda.silenced(noisy)
    print("after")
    assert capsys.readouterr().out == "a result of another thread\nafter\n"
    assert "Failed to load libcudart.so.13" in caplog.text


def test_a_process_without_standard_output(monkeypatch):
    called = []
    monkeypatch.setattr(sys, "stdout", None)
    _cuda.silenced(lambda: called.append(print("nowhere")))
    assert called == [None]


def test_standard_output_is_restored_after_a_failure(capsys):
    with contextlib.suppress(ZeroDivisionError):
        _cuda.silenced(lambda: 1 / 0)
    print("still here")
    assert capsys.readouterr().out == "still here\n"
