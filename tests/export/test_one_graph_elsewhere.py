"""The one graph outside of Python: from JavaScript, in a browser, and from C++, with caption-rt's words everywhere."""

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image

from bundles import ONE_GRAPH_TOLERANCES, exactest_precision
from caption_export.one_graph import build_one_graph
from caption_rt import Bundle, Captioner, DecodeOptions
from caption_rt.bundle import default_bundle_path
from caption_rt.image import read_photo

TESTS = Path(__file__).resolve().parent.parent
PAGE = TESTS.parent / "docs" / "browser"
ORT = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def unless(there, reason):
    """Skip for a reason; where everything is known to be there, fail (see tests/conftest.py)."""
    if there:
        return
    if os.environ.get("CAPTION_RT_NO_SKIP") == "1":
        pytest.fail(f"{reason}, and CAPTION_RT_NO_SKIP=1 allows no skip")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def node_modules():
    """Where npm put the packages of tests/javascript."""
    folder = Path(os.environ.get("CAPTION_RT_NODE_MODULES") or TESTS / "javascript" / "node_modules")
    unless(
        (folder / "onnxruntime-web").is_dir(), "npm's packages are not there: npm ci in tests/javascript brings them"
    )
    return folder


@pytest.fixture(scope="session")
def headers():
    """ONNX Runtime's C++ headers, as Debian's libonnxruntime-dev has them."""
    folder = Path(os.environ.get("CAPTION_RT_ONNXRUNTIME_HEADERS") or "/usr/include/onnxruntime")
    unless(
        (folder / "onnxruntime_cxx_api.h").is_file(), "ONNX Runtime's C++ headers (libonnxruntime-dev) are not there"
    )
    return folder


@pytest.fixture(scope="module")
def bundle():
    return Bundle.open(default_bundle_path())


@pytest.fixture(scope="module")
def models(bundle, tmp_path_factory):
    """The default bundle's one graph by beam size."""
    folder = tmp_path_factory.mktemp("models")
    for beam in (1, 3):
        (folder / f"{beam}.onnx").write_bytes(build_one_graph(bundle, options(beam), exactest_precision(bundle)))
    return {beam: folder / f"{beam}.onnx" for beam in (1, 3)}


def options(beam):
    return DecodeOptions(beam_size=beam, max_words=40, guard=False)


@pytest.fixture(scope="module")
def expected(bundle, photos):
    """What caption-rt says of the committed photos, by beam size."""
    pixels = [read_photo(path, bundle.manifest.image.size) for path in photos]
    with Captioner(bundle, "cpu", precision=exactest_precision(bundle)) as captioner:
        return {beam: captioner.caption_pixels(pixels, options(beam)) for beam in (1, 3)}


@pytest.fixture(scope="module")
def raw(bundle, photos, tmp_path_factory):
    """The photos as a file of bytes, and their number and sizes as arguments."""
    size = bundle.manifest.image.size
    path = tmp_path_factory.mktemp("raw") / "photos.bin"
    path.write_bytes(np.stack([read_photo(photo, size) for photo in photos]).tobytes())
    return [str(path), str(len(photos)), str(size), str(size)]


# -- JavaScript ------------------------------------------------------------------------------------------------------


@pytest.mark.program("node")
@pytest.mark.parametrize("beam", [1, 3])
def test_node_gives_the_same_tokens(node_modules, models, expected, raw, beam):
    script = TESTS / "javascript" / "caption.cjs"
    done = subprocess.run(
        ["node", str(script), str(models[beam]), *raw],
        env=os.environ | {"NODE_PATH": str(node_modules)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    found = {name: np.array(tensor["data"]).reshape(tensor["dims"]) for name, tensor in json.loads(done.stdout).items()}
    for row, caption in enumerate(expected[beam]):
        length = found["lengths"][row]
        assert tuple(found["tokens"][row, :length]) == caption.tokens
        assert tuple(found["words"][row, :length]) == caption.words
        tolerance = ONE_GRAPH_TOLERANCES[caption.precision]
        assert found["log_prob"][row] == pytest.approx(caption.log_prob, abs=10 * tolerance)
        np.testing.assert_allclose(found["attention"][row, :length], caption.attention, atol=10 * tolerance)


@pytest.mark.program("node")
def test_the_properties_are_read_without_onnx(models, bundle):
    script = (
        "import { readFileSync } from 'node:fs';"
        f"const {{ properties }} = await import({json.dumps((PAGE / 'properties.js').as_uri())});"
        "console.log(JSON.stringify(properties(readFileSync(process.argv[1]))));"
    )
    # A module by its content, since there is no package that says so.
    command = ["node", "--no-warnings", "--experimental-default-type=module", "--input-type=module", "-e", script]
    done = subprocess.run([*command, str(models[1])], capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert json.loads(found["vocabulary"]) == list(bundle.vocabulary.words)
    assert (found["name"], found["license"]) == (bundle.manifest.name, bundle.manifest.license)


# -- C++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.program("g++")
@pytest.mark.parametrize("beam", [1, 3])
def test_cpp_gives_the_same_tokens(program, models, expected, raw, beam):
    done = subprocess.run(
        [str(program), str(models[beam]), *raw], capture_output=True, text=True, timeout=120, check=True
    )
    wanted = [f"{' '.join(map(str, caption.tokens))}\t{caption.text}" for caption in expected[beam]]
    assert done.stdout.splitlines() == wanted


@pytest.fixture(scope="module")
def program(headers, tmp_path_factory):
    """tests/cpp/caption.cpp, compiled, with the library of the installed package."""
    folder = tmp_path_factory.mktemp("cpp")
    package = Path(importlib.util.find_spec("onnxruntime").origin).parent / "capi"
    libraries = sorted(package.glob("libonnxruntime.so.*"))
    unless(libraries, "the installed onnxruntime has no library of its own")
    library = folder / "libonnxruntime.so.1"  # what it calls itself
    library.symlink_to(libraries[0])
    out, source = folder / "caption", TESTS / "cpp" / "caption.cpp"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", f"-I{headers}", str(source), str(library), "-o", str(out)]
    subprocess.run([*command, f"-Wl,-rpath,{folder}"], check=True, timeout=300)
    return out


# -- In a browser ----------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = MappingProxyType(
        {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}
    )

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def site(node_modules, models, tmp_path_factory):
    """The page with what it needs beside it."""
    folder = tmp_path_factory.mktemp("site") / "browser"
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("ort", "*.onnx"))
    (folder / "ort").mkdir()
    for name in ORT:
        shutil.copy(node_modules / "onnxruntime-web" / "dist" / name, folder / "ort")
    shutil.copy(models[1], folder / "caption.onnx")
    return folder


@pytest.fixture
def show(browser, site):
    """Opens the page, or one without some of its files."""
    with contextlib.ExitStack() as stack:

        def show(*, without=None, script=None, **context):
            address = stack.enter_context(served(site))
            page = stack.enter_context(browser.new_context(reduced_motion="reduce", **context)).new_page()
            if script:
                page.add_init_script(script)
            if without:
                page.route(f"**/{without}", lambda route: route.fulfill(status=404))
            page.asked, page.wrong = [], []
            page.on("request", lambda request: page.asked.append(request.url))
            page.on("pageerror", lambda error: page.wrong.append(str(error)))
            page.goto(address)
            page.address = address
            return page

        yield show


def done(page):
    """Wait for the caption of the photo that was given last."""
    # Not wait_for_function, which evaluates text: the page's policy forbids that.
    page.locator("#status", has_text="Done").wait_for(timeout=60_000)


def caption(page, path):
    """The words that the page shows for a photo."""
    page.locator("#photo").set_input_files(path)
    done(page)
    return page.locator(".words button").all_inner_texts()


def complaint(page, about=""):
    page.locator("#error", has_text=about).wait_for(timeout=60_000)
    return page.locator("#error").inner_text()


@pytest.mark.program("chromium")
def test_a_browser_gives_the_same_words_and_nothing_leaves_the_page(show, photos, expected):
    page = show()
    for path, wanted in zip(photos, expected[1], strict=True):
        assert tuple(caption(page, path)) == wanted.words
    assert page.locator("figure img").get_attribute("alt") == wanted.text
    assert "Licence: Apache-2.0" in page.locator("#about").inner_text()
    own = ("", "style.css", "page.js", "worker.js", "properties.js", "caption.onnx", *(f"ort/{name}" for name in ORT))
    outside = [url for url in page.asked if not url.startswith(("blob:", "data:"))]
    assert set(outside) == {page.address + name for name in own}
    assert page.wrong == []


@pytest.mark.program("chromium")
def test_page_and_worker_are_refused_every_other_address(show):
    page = show()
    page.locator("#about:not(:empty)").wait_for()
    ask = "fetch('http://127.0.0.1:9/').then(() => 'sent', error => error.message)"
    violation = (
        "new Promise(done => {{ addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));"
        " {}; }})"
    )
    assert page.evaluate(violation.format(ask)) == "connect-src"
    (worker,) = page.workers
    assert worker.evaluate(violation.format(ask)) == "connect-src"


@pytest.mark.program("chromium")
def test_the_attention_shows_for_the_word_under_pointer_focus_and_finger(show, photos, expected):
    page = show()
    words = caption(page, photos[0])
    canvas, label, buttons = page.locator("canvas"), page.locator(".photo b"), page.locator(".words button")
    assert not canvas.is_visible()
    buttons.nth(3).hover()
    assert canvas.is_visible()
    probability = np.exp(expected[1][0].word_log_probs[3])
    assert label.inner_text() == f"{words[3]} · {probability:.0%}"
    # Over the photo exactly, and bright where the model looked most.
    assert canvas.bounding_box() == page.locator("figure img").bounding_box()
    attention = expected[1][0].attention[3]
    row, column = np.unravel_index(attention.argmax(), attention.shape)
    darkness = page.evaluate(
        "([x, y]) => { const c = document.querySelector('canvas');"
        " return c.getContext('2d').getImageData(x * c.width, y * c.height, 1, 1).data[3]; }",
        [(column + 0.5) / attention.shape[1], (row + 0.5) / attention.shape[0]],
    )
    assert darkness < 90
    page.mouse.move(1, 1)
    assert not canvas.is_visible()
    # By keyboard: one stop for the sentence, arrows inside it.
    page.locator("#photo").focus()
    page.keyboard.press("Tab")
    assert label.inner_text().startswith(f"{words[0]} ·")
    page.keyboard.press("ArrowRight")
    assert label.inner_text().startswith(f"{words[1]} ·")
    page.keyboard.press("End")
    assert label.inner_text().startswith(f"{words[-1]} ·")
    page.keyboard.press("Enter")
    assert buttons.last.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert buttons.last.get_attribute("aria-pressed") == "false"
    phone = show(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    caption(phone, photos[1])
    phone.locator(".words button").nth(1).tap()
    assert phone.locator("canvas").is_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.program("chromium")
def test_the_light_lies_over_a_photo_of_any_shape(show, photos, tmp_path):
    """A photo narrower than its label: what shows over it must not move it, or words flicker under the pointer."""
    page = show()
    for size in ((40, 400), (900, 60)):
        path = tmp_path / "photo.png"
        with Image.open(photos[0]) as photo:
            photo.resize(size).save(path)
        caption(page, path)
        image, canvas = page.locator("figure img"), page.locator("canvas")
        before = image.bounding_box()
        page.locator(".words button").nth(1).hover(timeout=5000)
        assert image.bounding_box() == before
        assert canvas.bounding_box() == pytest.approx(before, abs=1)


@pytest.mark.program("chromium")
def test_photos_are_dropped_and_upright(show, bundle, photos, tmp_path):
    """The same photo, stored on its side with an EXIF orientation: the same caption."""
    turned = tmp_path / "turned.png"
    with Image.open(photos[0]) as photo:
        exif = Image.Exif()
        exif[0x0112] = 6
        photo.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
        upright = tmp_path / "upright.png"
        photo.save(upright)
    with Captioner(bundle, "cpu", precision=exactest_precision(bundle)) as captioner:
        wanted = captioner.caption(turned, options(1))
    page = show()
    assert caption(page, turned) == caption(page, upright) == list(wanted.words)
    box = page.locator("figure img").bounding_box()
    assert box["width"] == pytest.approx(box["height"], abs=1)
    dropped = page.evaluate_handle(
        "bytes => { const all = new DataTransfer();"
        " all.items.add(new File([new Uint8Array(bytes)], 'cat.jpg', { type: 'image/jpeg' })); return all; }",
        list(photos[1].read_bytes()),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    done(page)
    assert page.locator("figure img").evaluate("photo => [photo.naturalWidth, photo.naturalHeight]") == [451, 300]


@pytest.mark.program("chromium")
def test_what_goes_wrong_is_one_sentence(show, tmp_path):
    (tmp_path / "notes.jpg").write_text("no photo")
    (tmp_path / "other.onnx").write_bytes(b"\x08\x08")
    Image.new("L", (9000, 6000)).save(tmp_path / "huge.png")
    page = show()
    page.locator("#about:not(:empty)").wait_for()
    page.locator("#photo").set_input_files(tmp_path / "notes.jpg")
    assert complaint(page) == "notes.jpg is not a photo that this browser can read: choose a JPEG, PNG or WebP."
    page.locator("#photo").set_input_files(tmp_path / "huge.png")
    said = complaint(page, "huge.png")
    assert said == "huge.png has 54 megapixels, and this page reads up to 50: scale it down first."
    page.locator("#model").set_input_files(tmp_path / "other.onnx")
    said = complaint(page, "other.onnx")
    assert said == "other.onnx is not a model of this page's kind: caption-export graph makes one."
    assert page.wrong == []
    nothing = show(script="delete globalThis.WebAssembly")
    assert complaint(nothing).startswith("This browser has no WebAssembly")
    bare = show(without="ort/ort.wasm.min.mjs")
    assert complaint(bare).startswith("onnxruntime-web is missing")


@pytest.mark.program("chromium")
def test_a_page_without_a_model_takes_ones_own(show, models, photos, expected):
    page = show(without="caption.onnx")
    assert complaint(page).startswith("There is no model beside this page")
    page.locator("#photo").set_input_files(photos[2])
    page.locator("#model").set_input_files(models[3])
    done(page)
    assert tuple(page.locator(".words button").all_inner_texts()) == expected[3][2].words
