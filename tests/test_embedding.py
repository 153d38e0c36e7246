"""docs/embedding.md, run as it stands: each snippet in order, the service by a real server, the worker by Qt."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from caption_rt import Captioner

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "embedding.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def snippet(beginning):
    """The one snippet with a certain line in it."""
    (found,) = [text for text in SNIPPETS if beginning in text]
    return found


@pytest.fixture(scope="module")
def expected(photos):
    """The caption of photo.jpg."""
    with Captioner.load() as captioner:
        return captioner.caption(photos[2]).text


@pytest.fixture
def folder(tiny_bundle, photos, tmp_path, monkeypatch):
    """A working folder with photo.jpg, photos/ and my-bundle; the default bundle is the one that is shipped."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bundle, "my-bundle")
    shutil.copy(photos[2], "photo.jpg")
    Path("photos").mkdir()
    for photo in photos:
        shutil.copy(photo, "photos")
    return tmp_path


def test_the_snippets_run_in_order(folder, expected, capsys):
    pytest.importorskip("fastapi")
    pytest.importorskip("PySide6.QtCore")
    names = {"__name__": "embedding"}
    for text in SNIPPETS:
        # The one that asks for CUDA catches the error where there is none.
        exec(text, names)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{expected}\n")
    assert f"{Path('photos', 'coffee.jpg')}: {expected}\n" in printed
    assert f"\n{expected} " in printed  # word by word
    assert names["texts"][2] == expected
    assert names["result"].max_difference < names["result"].tolerance
    names["thread"].quit()
    assert names["thread"].wait(5000)


def test_the_script(folder, expected, capsys):
    names = {"__name__": "script"}
    exec(snippet("def main(paths)"), names)
    assert names["main"](["photo.jpg", "missing.jpg", "photo.jpg"]) == 4
    printed = capsys.readouterr()
    assert printed.out == f"photo.jpg: {expected}\n" * 2
    assert printed.err == "missing.jpg does not exist: check the path\n"


def post(port, data):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/caption", data, {"Content-Type": "image/jpeg"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_service(folder, expected):
    """A server of its own, asked by eight clients at once."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    Path("service.py").write_text(snippet("app = FastAPI"), encoding="utf-8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "service:app", "--port", str(port), "--log-level", "warning"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.1)
        data = Path("photo.jpg").read_bytes()
        answers = []
        clients = [threading.Thread(target=lambda: answers.append(post(port, data))) for _ in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert [(status, body["caption"]) for status, body in answers] == [(200, expected)] * 8
        status, body = post(port, b"no photo at all")
        assert status == 422
        assert "the image data" in body["detail"]
    finally:
        server.terminate()
        printed, _ = server.communicate(timeout=20)
    assert printed == b""


def test_the_worker_of_a_window(folder, expected):
    core = pytest.importorskip("PySide6.QtCore")
    application = core.QCoreApplication.instance() or core.QCoreApplication([])
    names = {"__name__": "window"}
    exec(snippet("class CaptionWorker"), names)
    exec(snippet("worker.moveToThread"), names)
    worker, thread = names["worker"], names["thread"]
    heard = []

    class Window(core.QObject):
        chosen = core.Signal(str)

        @core.Slot(str, str)
        def hear(self, path, text):
            heard.append((path, text, core.QThread.currentThread() is application.thread()))
            if "missing.jpg" in path:
                application.quit()

    window = Window()
    window.chosen.connect(worker.caption)
    for signal in (worker.word, worker.done, worker.failed):
        signal.connect(window.hear)
    window.chosen.emit("photo.jpg")
    window.chosen.emit("missing.jpg")
    core.QTimer.singleShot(20_000, application.quit)
    application.exec()
    thread.quit()
    assert thread.wait(5000)
    assert [(path, text) for path, text, _ in heard] == [
        *[("photo.jpg", word) for word in expected.split()],
        ("photo.jpg", expected),
        ("missing.jpg", "missing.jpg does not exist: check the path"),
    ]
    assert all(on_main_thread for *_, on_main_thread in heard)
