"""Attention plots: every number of words, every shape of photo, every format; and what is bright is where it looked."""

import io
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from caption_rt import Caption, CaptionError, ImageError, OptionsError, PhotoLimits, Timing
from caption_rt.attention import plot_attention, upsample
from caption_rt.cli import main

pytest.importorskip("matplotlib")


def caption_of(words, attention=None):
    count = len(words)
    if attention is None:
        attention = np.full((count, 2, 3), 1 / 6, np.float32)
    return Caption(
        text=" ".join(words),
        tokens=tuple(range(count)),
        words=tuple(words),
        log_prob=-1.0 * count,
        word_log_probs=(-1.0,) * count,
        attention=attention,
        ended="end",
        strategy="greedy",
        retried_for=(),
        faults=(),
        provider="CPUExecutionProvider",
        precision="fp32",
        timing=Timing(0.0, 0.0, 0.0, 0.0),
    )


def render(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 13])
def test_any_number_of_words(count):
    words = [f"word{i}" for i in range(count)]
    figure = plot_attention(Image.new("RGB", (60, 40), "red"), caption_of(words))
    panels = figure.get_axes()
    assert [axes.get_title() for axes in panels] == ([f"{i + 1} {word}" for i, word in enumerate(words)] or [""])
    assert figure.get_suptitle() == (" ".join(words) or "(no words)")
    assert min(render(figure).size) > 100


@pytest.mark.parametrize("size", [(640, 80), (80, 640), (1, 1), (3000, 2000)])
def test_any_shape_of_photo_keeps_its_shape(size):
    figure = plot_attention(Image.new("RGB", size, "blue"), caption_of(["a", "cat"]))
    height, width = figure.get_axes()[0].get_images()[0].get_array().shape[:2]
    assert max(width, height) <= 400
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)


def test_words_are_drawn_as_they_are():
    figure = plot_attention(Image.new("RGB", (20, 20)), caption_of(["$\\alpha$", "don't", "grün"]))
    assert figure.get_axes()[0].get_title() == "1 $\\alpha$"
    assert min(render(figure).size) > 100


def test_upsampling_is_smooth_and_in_place():
    attention = np.array([[0.0, 0.0, 0.8], [0.2, 0.0, 0.0]], np.float32)
    light = upsample(attention, (90, 40))
    assert (light.dtype, light.shape) == (np.float32, (40, 90))
    assert light.min() >= 0
    assert light.max() == 1
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert row < 15
    assert column > 65
    assert light[35, 5] == pytest.approx(0.25, abs=0.05)
    # No step between neighbours: a quarter of the difference of two places at most.
    assert np.abs(np.diff(light, axis=1)).max() < 0.1
    assert upsample(np.zeros((2, 3), np.float32), (6, 4)).max() == 0


def test_a_word_lights_the_place_where_it_looked():
    attention = np.zeros((2, 2, 3), np.float32)
    attention[0, 0, 2] = attention[1, 1, 0] = 1
    figure = plot_attention(Image.new("RGB", (90, 60), (200, 100, 50)), caption_of(["up", "down"], attention))
    brightest = []
    for axes in figure.get_axes():
        brightness = np.asarray(axes.get_images()[0].get_array()).mean(axis=2)
        quarters = {
            (row, column): brightness[row * 30 : row * 30 + 30, column * 30 : column * 30 + 30].mean()
            for row in range(2)
            for column in range(3)
        }
        brightest.append(max(quarters, key=quarters.get))
        assert max(quarters.values()) > 2 * min(quarters.values())
    assert brightest == [(0, 2), (1, 0)]


def test_a_sheet_of_many_words_is_bounded_and_has_a_title_to_be_read(tmp_path):
    caption_of(["word"] * 36).plot(Image.new("RGB", (60, 60)), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as plot:
        assert 3.9e6 < plot.width * plot.height < 4.1e6
    few, many = (plot_attention(Image.new("RGB", (60, 40)), caption_of(["word"] * count)) for count in (6, 60))
    assert few._suptitle.get_fontsize() == 10
    assert many._suptitle.get_fontsize() > 15


@pytest.mark.parametrize(("name", "beginning"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")])
def test_the_ending_decides_the_format(tmp_path, photos, name, beginning):
    path = tmp_path / name
    path.write_text("an older file")
    caption_of(["a", "cat"]).plot(photos[1], path)
    assert path.read_bytes().startswith(beginning)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt", ".png"])
def test_another_ending_is_refused(tmp_path, photos, name):
    with pytest.raises(OptionsError, match=r"a plot's name ends in one of \.png, \.svg, \.pdf"):
        caption_of(["a"]).plot(photos[1], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_cannot_be_written(tmp_path, photos):
    with pytest.raises(CaptionError) as caught:
        caption_of(["a"]).plot(photos[1], tmp_path / "missing" / "a.png")
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        f"the plot {tmp_path}/missing/a.png cannot be written (No such file or directory): name a file elsewhere"
    )
    (tmp_path / "a.png").mkdir()
    with pytest.raises(CaptionError, match="cannot be written"):
        caption_of(["a"]).plot(photos[1], tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(ImageError, match="does not exist"):
        caption_of(["a"]).plot(tmp_path / "none.jpg", tmp_path / "b.png")


def test_the_photo_is_drawn_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20), "green").save(tmp_path / "turned.jpg", exif=exif)
    caption_of(["a"]).plot(tmp_path / "turned.jpg", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as plot:
        width, height = plot.size
    assert height > 2 * width


def test_limits_are_those_that_are_given(tmp_path, photos):
    few = PhotoLimits(max_pixels=100)
    with pytest.raises(ImageError, match=r"^here\.jpg .*100"):
        caption_of(["a"]).plot(photos[1].read_bytes(), tmp_path / "a.png", limits=few, name="here.jpg")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_the_command_plots_what_it_may_read(tmp_path, tiny_bundle, capsys):
    """A photo above the limit of pixels that holds where nothing else is asked for."""
    Image.new("1", (14_000, 13_000)).save(tmp_path / "large.png")
    arguments = ["--device", "cpu", "--model", str(tiny_bundle), "--plot", str(tmp_path / "a.png")]
    code = main([*arguments, "--max-pixels", "182000000", str(tmp_path / "large.png")])
    assert (code, capsys.readouterr().err) == (0, "")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_nothing_is_said_of_a_folder_that_matplotlib_cannot_write(tmp_path, tiny_bundle, photos):
    """Without its own folder it takes a temporary one, and would say so on standard error."""
    (tmp_path / "file").touch()
    arguments = ["--device", "cpu", "--model", tiny_bundle, "--plot", tmp_path / "a.png", photos[2]]
    done = subprocess.run(
        [sys.executable, "-m", "caption_rt", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MPLCONFIGDIR": f"{tmp_path}/file/x"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("in dog cat ball cat\n", "")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_pyplots_state_is_not_touched(photos, tmp_path):
    caption_of(["a"]).plot(photos[1], tmp_path / "a.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path, photos):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionsError, match=r"pip install 'caption-rt\[plot\]' brings it"):
        caption_of(["a"]).plot(photos[1], tmp_path / "a.png")


SHOW = """
import sys
from caption_rt import Captioner
from caption_rt.attention import show_plot
show_plot(sys.argv[1], Captioner.load(sys.argv[2]).caption(sys.argv[1]))
print("closed")
"""


@pytest.fixture
def show(tiny_bundle, photos):
    """Show the plot of a caption in a process of its own."""

    def start(**environment):
        bare = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
        bare["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            [sys.executable, "-c", SHOW, photos[2], tiny_bundle],
            env=bare | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a screen")
def test_without_a_screen_no_window(show):
    process = show()
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed == ""
    assert "OptionsError: no window can be opened: there is no screen" in error.splitlines()[-1]


@pytest.mark.program("Xvfb", "xdotool")
def test_a_window_shows_the_plot_until_it_is_closed(show):
    reader, writer = os.pipe()
    screen = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writer), "-screen", "0", "1600x1200x24"],
        pass_fds=[writer],
        stderr=subprocess.DEVNULL,
    )
    process = None
    try:
        os.close(writer)
        with os.fdopen(reader) as numbers:
            display = f":{numbers.readline().strip()}"
        process = show(DISPLAY=display)
        window = ""
        for _ in range(300):
            found = subprocess.run(
                ["xdotool", "search", "--onlyvisible", "--name", "caption-rt: in dog cat ball cat"],
                env=os.environ | {"DISPLAY": display},
                capture_output=True,
                text=True,
                check=False,
            )
            window = found.stdout.strip()
            if window:
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        assert window
        # The key with which matplotlib closes a window; until it is pressed the process waits.
        time.sleep(0.5)
        assert process.poll() is None
        for _ in range(50):
            subprocess.run(
                ["xdotool", "windowfocus", window, "key", "--window", window, "q"],
                env=os.environ | {"DISPLAY": display},
                stderr=subprocess.DEVNULL,
                check=False,
            )
            try:
                process.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                continue
        printed, _ = process.communicate(timeout=10)
        assert (process.returncode, printed) == (0, "closed\n")
    finally:
        if process is not None:
            process.kill()
            process.wait()
        screen.kill()
        screen.wait()
