"""The gallery: what a line holds; and, in a real browser, what a person sees and that nothing leaves the page."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from caption_rt.attention import upsample
from caption_rt.bundle import default_bundle_path
from caption_rt.captioner import Captioner
from caption_rt.errors import ImageError
from caption_rt.gallery import HEADER, confidence_of, figure, thumbnail_of
from caption_rt.image import open_photo
from caption_rt.records import Record
from made_captions import caption_of

WHITE = thumbnail_of(Image.new("RGB", (300, 200), "white"))
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>.jpg'

# Two words that look at opposite corners of a grid of 2 x 3.
CORNERS = np.zeros((2, 2, 3), np.float32)
CORNERS[0, 0, 0] = CORNERS[1, 1, 2] = 1


def page_of(*records):
    return HEADER + b"".join(figure(record) for record in records)


class Elements(HTMLParser):
    """The start tags of a document with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text.decode())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_a_figure_holds_photo_caption_confidence_path_and_attention():
    caption = caption_of("a dog", word_log_probs=(np.log(0.9), np.log(0.4)), attention=CORNERS)
    line = figure(Record("photos/a.jpg", caption, WHITE))
    elements = Elements(line)
    (image,) = elements.of("img")
    assert image["alt"] == "a dog"
    assert base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,")) == WHITE
    words = [attributes for attributes in elements.of("span") if "data-look" in attributes]
    assert [word["data-sure"] for word in words] == ["90", "40"]
    assert [list(base64.b64decode(word["data-look"])) for word in words] == [[255, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 255]]
    assert [word["tabindex"] for word in words] == ["0", "-1"]
    text = re.sub(rb"<[^>]*>", b"|", line).decode()
    for part in ("|a|", "|dog|", "|Confidence 60%|", "|photos/a.jpg|"):
        assert part in text
    assert float(elements.of("progress")[0]["value"]) == pytest.approx(0.6, abs=1e-4)


def test_confidence_is_the_geometric_mean_of_the_words_probabilities():
    assert confidence_of(caption_of("a dog", word_log_probs=(np.log(0.9), np.log(0.4)))) == pytest.approx(0.6)
    # It neither falls with the length nor counts the end, which a caption that was cut has not.
    assert confidence_of(caption_of("a a a a", ended="max_words")) == pytest.approx(np.exp(-1))
    assert confidence_of(caption_of("")) == 0


def test_a_bad_photo_is_shown_with_its_sentence():
    line = figure(Record("b.jpg", ImageError("b.jpg is empty (0 bytes): copy it again from its source")))
    assert b">b.jpg is empty (0 bytes): copy it again from its source<" in line
    assert Elements(line).of("figure") == [{"class": "bad"}]


def test_a_caption_without_words_or_with_faults_says_so():
    assert b">(no words)<" in figure(Record("a.jpg", caption_of(""), WHITE))
    line = figure(Record("a.jpg", caption_of("a a", faults=("repetition", "low_log_prob")), WHITE))
    assert b">Doubtful: repeats itself, very unlikely words<" in line


@pytest.mark.parametrize(("size", "small"), [((4000, 3000), (448, 336)), ((20, 30), (20, 30)), ((9000, 3), (448, 1))])
def test_a_thumbnail_is_a_small_jpeg_of_the_same_shape(size, small):
    photo = Image.new("RGB", size, (200, 30, 60))
    with Image.open(io.BytesIO(thumbnail_of(photo))) as thumbnail:
        assert (thumbnail.format, thumbnail.mode, thumbnail.size) == ("JPEG", "RGB", small)
        assert np.abs(np.asarray(thumbnail, np.int16) - (200, 30, 60)).max() < 6
    assert photo.size == size


def test_a_thumbnail_of_a_photo_takes_some_20_kb(photos):
    for path in photos:
        assert 5_000 < len(thumbnail_of(open_photo(path))) < 40_000


def test_the_page_allows_its_own_script_and_style_and_no_network():
    (policy,) = [tag["content"] for tag in Elements(HEADER).of("meta") if "http-equiv" in tag]
    directives = dict(directive.strip().split(" ", 1) for directive in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    assert "unsafe" not in policy
    assert (
        "http"
        not in re.sub(rb"http-equiv|http://www\.w3\.org/2000/svg", b"", page_of(Record("a", caption_of("a")))).decode()
    )
    assert not [attributes for _, attributes in Elements(HEADER).found if "style" in attributes]


# -- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page in a new window; in the end, nothing was asked of the network and no error was said."""
    contexts, wrong = [], []

    def opened(content, **settings):
        path = tmp_path / f"gallery{len(contexts)}.html"
        path.write_bytes(content)
        context = browser.new_context(
            **{"viewport": {"width": 1000, "height": 800}, "reduced_motion": "reduce"} | settings
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def word(page, text, nth=0):
    return page.locator("[data-look]", has_text=re.compile(f"^{text}$")).nth(nth)


def overlay(page):
    """The canvas's alpha, float [height, width] in 0 to 1."""
    data = page.evaluate("document.querySelector('canvas').toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 3] / 255


def shot(locator):
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("L"), np.float32)


@pytest.mark.program("chromium")
@pytest.mark.parametrize("model", ["tiny", "default"])
def test_the_word_under_the_pointer_shows_where_the_model_looked(show, photos, tiny_bundle, model):
    bundle = tiny_bundle if model == "tiny" else default_bundle_path()
    with Captioner.load(bundle, "cpu") as captioner:
        captions = [captioner.caption(path) for path in photos]
    thumbnails = [thumbnail_of(open_photo(path)) for path in photos]
    records = [Record(str(path), *rest) for path, *rest in zip(photos, captions, thumbnails, strict=True)]
    page = show(page_of(*records))
    assert page.locator("output").inner_text() == "3 photos"
    for index, caption in enumerate(captions):
        card = page.locator("figure").nth(index)
        assert card.locator(".words").inner_text() == caption.text
        for at in {0, len(caption.words) - 1}:
            card.locator("[data-look]").nth(at).hover()
            image = card.locator("img")
            assert card.locator("canvas").bounding_box() == image.bounding_box()
            assert card.locator(".photo b").inner_text().startswith(f"{caption.words[at]} · ")
            size = Image.open(io.BytesIO(thumbnails[index])).size
            # The grid has 255 steps, which the peak of the cubic filter stretches by a little more.
            light = upsample(np.rint(caption.attention[at] * (255 / caption.attention[at].max())), size)
            expected = 1 - (1 - 0.16 * light) * (1 - 0.74 * (1 - light))
            assert np.abs(overlay(page) - expected).max() < 3 / 255
    page.locator("h1").hover()
    assert page.locator("canvas").count() == 0


@pytest.mark.program("chromium")
@pytest.mark.parametrize("shape", [(300, 200), (100, 300), (400, 40)])
def test_the_bright_place_is_over_the_photo_whatever_its_shape(show, shape):
    thumbnail = thumbnail_of(Image.new("RGB", shape, "white"))
    page = show(page_of(Record("a.jpg", caption_of("up down", attention=CORNERS), thumbnail)))
    frame = page.locator(".photo")
    height, width = shot(frame).shape
    scale = min(width / shape[0], height / shape[1])
    left, top = (width - shape[0] * scale) / 2, (height - shape[1] * scale) / 2
    for text, row, column in (("up", 0, 0), ("down", 1, 2)):
        word(page, text).hover()
        seen = shot(frame)
        means = {
            (r, c): seen[
                int(top + (r + 0.3) * shape[1] * scale / 2) : int(top + (r + 0.7) * shape[1] * scale / 2) + 1,
                int(left + (c + 0.3) * shape[0] * scale / 3) : int(left + (c + 0.7) * shape[0] * scale / 3),
            ].mean()
            for r in range(2)
            for c in range(3)
        }
        assert max(means, key=means.get) == (row, column)
        assert means[row, column] > 2 * means[1 - row, 2 - column]
        # Beside the photo nothing is darkened.
        if left > 3:
            assert np.ptp(seen[: int(height * 0.7), : int(left) - 2]) < 30


@pytest.mark.program("chromium")
def test_the_keyboard_goes_from_photo_to_photo_and_from_word_to_word(show):
    caption = caption_of("up down", attention=CORNERS, word_log_probs=(-0.1, -2.0))
    page = show(page_of(Record("a.jpg", caption, WHITE), Record("b.jpg", caption, WHITE)))
    word(page, "up").focus()
    label = page.locator(".photo b")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        page.keyboard.press(key)
        seen.append((page.evaluate("document.activeElement.textContent"), label.inner_text()))
    up, down = ("up", "up · 90%"), ("down", "down · 14%")
    assert seen == [down, down, up, down, up]
    assert overlay(page)[40, 60] < 0.3 < 0.7 < overlay(page)[160, 240]
    page.keyboard.press("End")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('figure') === document.querySelectorAll('figure')[1]")
    assert page.locator("figure").nth(1).locator("canvas").count() == 1
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent") == "down"
    # Enter keeps it while the pointer looks at others; Escape lets go.
    page.keyboard.press("Enter")
    assert word(page, "down").get_attribute("aria-pressed") == "true"
    word(page, "up", 1).hover()
    assert label.inner_text() == "up · 90%"
    page.locator("h1").hover()
    assert label.inner_text() == "down · 14%"
    page.keyboard.press("Escape")
    assert page.locator("canvas").count() == 0
    assert page.locator("[aria-pressed]").count() == 0


@pytest.mark.program("chromium")
def test_on_a_phone_a_tapped_word_stays_and_everything_fits(show, photos):
    thumbnails = [thumbnail_of(open_photo(path)) for path in photos]
    page = show(
        page_of(*(Record(f"photos/{'long' * 30}.jpg", caption_of("up down"), thumbnail) for thumbnail in thumbnails)),
        viewport={"width": 360, "height": 740},
        has_touch=True,
        is_mobile=True,
        device_scale_factor=3,
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    boxes = [page.locator("figure").nth(index).bounding_box() for index in range(3)]
    assert len({box["x"] for box in boxes}) == 1
    assert boxes[0]["width"] > 320
    word(page, "down", 1).tap()
    assert page.locator("figure").nth(1).locator("canvas").count() == 1
    word(page, "up", 0).tap()
    assert page.locator("figure").nth(0).locator(".photo b").inner_text().startswith("up")
    assert page.locator("canvas").count() == 1
    word(page, "up", 0).tap()
    assert page.locator("canvas").count() == 0
    word(page, "up", 0).tap()
    page.locator("h1").tap()
    assert page.locator("canvas").count() == 0


def shown(page):
    return page.locator("figure:not([hidden]) .name").all_text_contents()


@pytest.mark.program("chromium")
def test_the_search_finds_the_beginnings_of_words(show):
    page = show(
        page_of(
            Record("1.jpg", caption_of("a man runs"), WHITE),
            Record("2.jpg", caption_of("a Woman walks a dog"), WHITE),
            Record("3.jpg", ImageError("3.jpg is empty (0 bytes)")),
            Record("holidays/cafe\u0301-4.jpg", caption_of("two dogs"), WHITE),
        )
    )
    count = page.locator("output")
    assert count.inner_text() == "4 photos, 1 without a caption"
    for text, found, said in (
        ("man", ["1.jpg"], "1 of 4 photos"),
        ("  DOG ", ["2.jpg", "holidays/cafe\u0301-4.jpg"], "2 of 4 photos"),
        ("walk wom", ["2.jpg"], "1 of 4 photos"),
        ("holi", ["holidays/cafe\u0301-4.jpg"], "1 of 4 photos"),
        ("caf\u00e9", ["holidays/cafe\u0301-4.jpg"], "1 of 4 photos"),
        ("cafe 4", ["holidays/cafe\u0301-4.jpg"], "1 of 4 photos"),
        ("empty", ["3.jpg"], "1 of 4 photos, 1 without a caption"),
        ("zebra", [], "0 of 4 photos"),
        (".*", ["1.jpg", "2.jpg", "3.jpg", "holidays/cafe\u0301-4.jpg"], "4 photos, 1 without a caption"),
    ):
        page.locator("input").fill(text)
        assert (shown(page), count.inner_text()) == (found, said)


@pytest.mark.program("chromium")
def test_photos_are_sorted_by_confidence_and_back(show):
    sure = {"1.jpg": -1.0, "2.jpg": -0.2, "4.jpg": -3.0}
    records = [Record(path, caption_of("a", word_log_probs=(value,)), WHITE) for path, value in sure.items()]
    records.insert(2, Record("3.jpg", ImageError("3.jpg is empty (0 bytes)")))
    page = show(page_of(*records))
    for order, expected in (("best", "2143"), ("worst", "4123"), ("given", "1234")):
        page.locator("select").select_option(order)
        assert [name[0] for name in shown(page)] == list(expected)
    # The words still work where they went.
    page.locator("select").select_option("best")
    page.locator("[data-look]").first.hover()
    assert page.locator("figure").first.locator("canvas").count() == 1


@pytest.mark.program("chromium")
def test_nothing_from_outside_becomes_markup(show):
    names = [EVIL, "a\nb\u2028.jpg", "caf\udce9.jpg", "</figure></body>", "<!--", "&lt;b&gt;", "javascript:alert(1)"]
    names += ["' onmouseover='alert(3)", "\u202egpj.exe"]
    page = show(
        page_of(
            *(Record(name, caption_of(EVIL.replace(" ", "")), WHITE) for name in names),
            *(Record(name, ImageError(f"{name} is not an image")) for name in names),
        )
    )
    assert page.locator("figure").count() == 2 * len(names)
    assert page.locator("script").count() == 1
    assert page.locator("figure img").count() == len(names)
    expected = [*names]
    expected[1:3] = ["a\\nb\\u2028.jpg", "caf\\udce9.jpg"]
    assert [text.strip() for text in page.locator(".name").all_text_contents()] == expected * 2
    page.locator("[data-look]").first.hover()
    assert page.locator(".photo b").text_content() == f"{EVIL.replace(' ', '')} · 37%"
    assert page.locator("img").first.get_attribute("alt") == EVIL.replace(" ", "")


@pytest.mark.program("chromium")
def test_a_file_that_was_cut_or_appended_to_still_opens(show):
    whole = page_of(*(Record(f"{index}.jpg", caption_of("up down"), WHITE) for index in range(3)))
    assert show(whole + figure(Record("3.jpg", caption_of("more"), WHITE))).locator("figure").count() == 4
    lines = whole.splitlines(keepends=True)
    assert show(b"".join(lines[:-1])).locator("output").inner_text() == "2 photos"
    assert show(HEADER).locator("output").inner_text() == "0 photos"
    half = show(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    assert shown(half)[:2] == ["0.jpg", "1.jpg"]
    word(half, "down", 1).hover()
    assert half.locator("canvas").count() == 1


@pytest.mark.program("chromium")
def test_the_browser_refuses_what_the_policy_does(browser, tmp_path):
    (tmp_path / "gallery.html").write_bytes(page_of(Record("a.jpg", caption_of("a"), WHITE)))
    page = browser.new_page()
    page.goto((tmp_path / "gallery.html").as_uri())
    refused = page.evaluate(
        "new Promise(done => { const found = [];"
        " addEventListener('securitypolicyviolation', e => found.push(e.effectiveDirective) > 2 && done(found.sort()));"
        " const add = (tag, values) => document.body.append(Object.assign(document.createElement(tag), values));"
        " add('img', { src: 'http://127.0.0.1:9/a.png' }); add('script', { textContent: 'document.title = 1' });"
        " add('link', { rel: 'stylesheet', href: 'http://127.0.0.1:9/a.css' }); })"
    )
    assert refused == ["img-src", "script-src-elem", "style-src-elem"]
    assert page.title() == "Captions"
    page.close()


@pytest.mark.program("chromium")
def test_thousands_of_photos_are_searched_and_sorted(show):
    caption = caption_of("a man in a blue shirt is holding a basketball")
    lines = [figure(Record(f"{index}.jpg", caption, WHITE)) for index in range(3000)]
    page = show(HEADER + b"".join(lines))
    assert page.locator("output").inner_text() == "3,000 photos"
    page.locator("input").fill("2999")
    assert shown(page) == ["2999.jpg"]
    page.locator("[data-look]:visible").first.hover()
    assert page.locator("canvas").count() == 1
    page.locator("input").fill("")
    page.locator("select").select_option("worst")
    assert page.locator("output").inner_text() == "3,000 photos"


@pytest.mark.program("chromium")
def test_light_and_dark_follow_the_system_and_are_readable(show):
    content = page_of(Record("a.jpg", caption_of("up down"), WHITE), Record("b.jpg", ImageError("b.jpg is empty")))
    luminances = {}
    for scheme in ("light", "dark"):
        page = show(content, color_scheme=scheme)
        for selector in (".words", ".sure", ".name", ".note", "summary", "output"):
            text, back = page.evaluate(
                "selector => { let e = document.querySelector(selector); const text = getComputedStyle(e).color;"
                " while (/rgba.*, 0\\)|color\\(/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement;"
                " return [text, getComputedStyle(e).backgroundColor]; }",
                selector,
            )
            bright, dark = sorted((luminance(text), luminance(back)), reverse=True)
            # WCAG 2.2, success criterion 1.4.3.
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (scheme, selector)
        luminances[scheme] = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert luminances["light"] > 0.8
    assert luminances["dark"] < 0.02


def luminance(colour):
    """WCAG's relative luminance of a CSS colour "rgb(r, g, b)"."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (int(x) / 255 for x in re.findall(r"\d+", colour)[:3])
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
