"""The page's own script, in a real browser: Debian's packages chromium and chromium-driver."""

import re
import shutil

import pytest
import torch

from sliming.config import PRESETS
from sliming.generate import Conversation
from sliming.inputs import Batch
from sliming.model import SliME
from sliming.page.page import explain, floats
from sliming.router import relevance, select
from sliming.tiny.held_out import held_out

pytestmark = pytest.mark.browser
QUESTIONS = ("What number is on the red bar?", "<script>document.title = 'gone'</script>?",
             "How many bars are there?")
GAMMAS = [number / 20 for number in range(1, 21)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, extra [test]")
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", "window-size=1280,1000",
                 f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(page.html, its model, its conversations): untrained, three questions on one picture."""
    torch.manual_seed(0)
    model = SliME.from_backbones(PRESETS["tiny"].model).eval()
    torch.nn.init.normal_(model.adapter.w_gate, std=0.2)
    folder = tmp_path_factory.mktemp("page")
    held_out("detail", 0)["image"].save(folder / "a & <b>.png")
    talks = []
    for question in QUESTIONS:
        talks.append(Conversation(model, [folder / "a & <b>.png"], max_new_tokens=3))
        list(talks[-1].ask(question))
    explain(model, talks, folder / "page.html")
    return folder / "page.html", model, talks


@pytest.fixture
def page(browser, made):
    """The browser with the page freshly open; nothing may be complained of in the end."""
    browser.get_log("browser")
    browser.get(made[0].as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').filter("
                                  "entry => !entry.name.startsWith('data:')).length") == 0


def scores_of(made, number):
    """The router's scores for a question [M], and its cosines with each word [Q, M]."""
    _, model, talks = made
    batch = Batch.pack([talks[number].first])
    with torch.no_grad():
        local, words = model.see(batch).local[0], model.llm.get_input_embeddings()(batch.question)
        return relevance(local, words), torch.stack([relevance(local, w[None]) for w in words])


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def text(browser, selector):
    return find(browser, selector)[0].text


def question(browser):
    """The words as one text: a token of nothing but a space shows as a dot."""
    return text(browser, "#words").translate({ord("·"): " ", 0x2060: None})


def slide(browser, gamma):
    browser.execute_script("const slider = document.getElementById('gamma'); slider.value ="
                           "arguments[0]; slider.dispatchEvent(new Event('input'))", gamma)


def point(browser, element, x=0.5, y=0.5):
    """Moves the mouse to a share of an element's width and height."""
    from selenium.webdriver import ActionChains
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    size = element.size
    ActionChains(browser, duration=0).move_to_element_with_offset(
        element, (x - 0.5) * size["width"], (y - 0.5) * size["height"]).perform()


def press(browser, *keys):
    from selenium.webdriver import ActionChains
    ActionChains(browser).send_keys(*keys).perform()


def test_the_slider_keeps_what_the_router_keeps(page, made):
    assert text(page, "#value") == "0.75"
    for number in (0, 2):
        find(page, "[role=tab]")[number].click()
        scores = scores_of(made, number)[0]
        for gamma in GAMMAS:
            slide(page, gamma)
            expected = select(scores, gamma) if gamma < 1 else torch.ones_like(scores).bool()
            kept = page.execute_script(
                "return select(routed().order, routed().weights, state.gamma)")
            assert kept == expected.tolist(), gamma
            assert text(page, "#kept") == f"{int(expected.sum())} of {len(expected)}"
    assert text(page, "#saved") == "0 %"


@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "wide", "zeros", "one", "nan"])
def test_the_rule_bit_for_bit(page, kind):
    generator = torch.Generator().manual_seed(0)
    scores = 0.1 * torch.randn(997, generator=generator)
    scores = {"spread": scores, "ties": (scores * 30).round() / 30, "equal": torch.ones(64),
              "wide": 400 * scores, "zeros": torch.tensor([0.0, -0.0] * 8),
              "one": scores[:1], "nan": torch.where(scores > 0.2, torch.nan, scores)}[kind]
    # Shares that some sums reach exactly are the hardest: a sixty-fourth at a time.
    gammas = [g for g in GAMMAS if g < 1] + [number / 64 for number in range(1, 64)]
    weights = (scores - scores.max()).exp()
    found = page.execute_script(
        "const scores = bytes(arguments[0], Float32Array), order = ranking(scores);"
        "return arguments[2].map(gamma => select(order, bytes(arguments[1], Float32Array), gamma))",
        floats(scores), floats(weights), gammas)
    for gamma, kept in zip(gammas, found, strict=True):
        assert kept == select(scores, gamma).tolist(), gamma


def test_pointing_at_a_token_and_at_a_word(page, made):
    scores, cosines = scores_of(made, 0)
    across = made[2][0].first.images[0].grid[0] * 4
    canvas, before = find(page, "#map")[0], page.execute_script("return map.toDataURL()")
    column, row = 5, 2
    at = row * across + column
    point(page, canvas, (column + 0.5) / across, (row + 0.5) / (len(scores) / across))
    rank = 1 + int((scores > scores[at]).sum())
    shown = text(page, "#inspect")
    assert f"column {column + 1}, row {row + 1}" in shown and f"{rank} of {len(scores)}" in shown
    assert f"{100 * scores.softmax(0)[at]:.2f} %" in shown
    for value in cosines[:, at].tolist():
        assert f"{value:.3f}".replace("-", "\u2212") in shown
    # A word recolours the image by itself alone; held by a click, until Escape.
    words = find(page, ".word")
    red = [one.text.strip() for one in words].index("red")
    word = words[red]
    point(page, word)
    assert "cosine with \u201cred\u201d" in text(page, "#legend")
    assert f"{cosines[red].max():.3f}" in text(page, "#legend")
    recoloured = page.execute_script("return map.toDataURL()")
    assert recoloured != before
    point(page, find(page, "h1")[0])
    assert "mean cosine" in text(page, "#legend")
    assert page.execute_script("return map.toDataURL()") == before
    word.click()
    point(page, find(page, "h1")[0])
    assert word.get_attribute("aria-pressed") == "true" and "red" in text(page, "#legend")
    press(page, "\ue00c")  # Escape
    assert "mean cosine" in text(page, "#legend")


def test_layers(page, made):
    looks = set()
    for name in ("relevance", "kept", "crops", "gate"):
        page.execute_script("document.querySelector(`[value=${arguments[0]}]`).click()", name)
        looks.add(page.execute_script("return map.toDataURL()"))
    assert len(looks) == 4
    assert re.findall(r"[.\d]+", text(page, "#legend")) == ["0.000", "1.000"]  # of all gates alike
    point(page, find(page, "#map")[0], 0.01, 0.01)
    with torch.no_grad():
        gates = made[1].see(Batch.pack([made[2][0].first])).gates[0, 0]
    assert all(f"{gate:.3f}" in text(page, "#inspect") for gate in gates.tolist())


def test_tabs_and_keys(page, made):
    left, right, tab, space = "\ue012", "\ue014", "\ue004", " "
    tabs = find(page, "[role=tab]")
    assert [one.text for one in tabs] == list(QUESTIONS)
    tabs[0].click()
    for number in (1, 2, 0, 2):  # around
        press(page, left if number == 2 and tabs[0].get_attribute("aria-selected") == "true"
              else right)
        assert [one.get_attribute("aria-selected") for one in tabs].index("true") == number
        assert question(page) == QUESTIONS[number]
        assert page.switch_to.active_element == tabs[number]
    press(page, tab)  # to the first word
    assert page.switch_to.active_element.text == "How"
    assert "\u201cHow\u201d" in text(page, "#legend")
    press(page, space)
    assert page.switch_to.active_element.get_attribute("aria-pressed") == "true"
    for _ in range(9):
        press(page, tab)
        if page.switch_to.active_element == find(page, "#map")[0]:
            break
    press(page, right, right)
    assert "column 2, row 1" in text(page, "#inspect")
    press(page, tab, right)  # the slider
    assert text(page, "#value") == "0.76"
    button = find(page, "#answers button")[-1]
    button.send_keys(space)
    assert text(page, "#value") == "0.25"


def test_text_from_outside_stays_text(page, made):
    assert page.title.startswith("a & <b>.png")
    assert text(page, "h1") == "a & <b>.png"
    assert len(find(page, "script")) == 2 and not find(page, "h1 b")


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_on_a_desk_and_a_phone(page, width, theme):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 500})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": theme}]})
    wide, dark = page.execute_script(
        "return [document.documentElement.scrollWidth,"
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 128]")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert wide <= width and dark == (theme == "dark")


def test_several_images_a_released_prompt_and_later_turns(browser, made, tmp_path):
    """A page for the settings of the released models, which had another system prompt and rule."""
    model = made[1]
    settings = {"router_text": "all", "router_score": "sum", "slicing": "official",
                "template": "vicuna_v1", "global_view": "squash"}
    before = {name: getattr(model.config, name) for name in settings}
    for name, value in settings.items():
        setattr(model.config, name, value)
    pictures = [held_out("detail", number)["image"] for number in (0, 1)]
    talk = Conversation(model, [pictures[0], pictures[1].resize((300, 80))], max_new_tokens=3)
    for words in ("Which?", "And <b>now</b>?"):
        list(talk.ask(words))
    explain(model, [talk], tmp_path / "page.html")
    for name, value in before.items():
        setattr(model.config, name, value)
    browser.get_log("browser")
    browser.get((tmp_path / "page.html").as_uri())
    assert "A chat between" in question(browser) and "<b>now</b>" in text(browser, "#turns")
    first = text(browser, "#grids")
    browser.execute_script("document.querySelector('[name=picture][value=\"1\"]').click()")
    assert text(browser, "#grids") != first and not find(browser, "[role=tab]")
    assert browser.get_log("browser") == []
