"""The page in a browser: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_pipeline as ip
from tests import tiny
from tests.conftest import remember_blocks
from tests.influence_pipeline.test_report import HOSTILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on PATH: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install "influence-pipeline[test]"')

N, T, TESTS = 60, 10, 600
"""Training samples, tests of the small pages, and tests of the long one, which are more than are in a block of data."""
Open = Callable[..., Any]


def texts(sample: Any) -> str:
    """Return a hostile text for some samples, and a text of its own for the others."""
    number = round(abs(float(sample[0][0])) * 1000)
    return HOSTILE[number % len(HOSTILE)] if number % 2 else f"text number {number}"


def pictures(sample: Any) -> torch.Tensor:
    return torch.outer(sample[0], sample[0]).expand(3, -1, -1)


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return pages of the tiny experiment, by what samples look like."""
    folder = tmp_path_factory.mktemp("pages")
    names = {"hostile": HOSTILE[:3], "pictures": ["zero", "one", "two"]}
    shows = {"hostile": texts, "pictures": pictures, "values": None}
    with pytest.MonkeyPatch.context() as patch:
        remember_blocks(patch)
        tiny.shrink_blocks()
        found = {}
        for kind, show in shows.items():
            experiment = tiny.experiment(show=show, label_names=names.get(kind))
            pipeline = ip.Pipeline(experiment, finished, tiny.settings())
            found[kind] = pipeline.report("holdout", folder / f"{kind}.html", k=4)
    experiment = tiny.experiment(show=texts, tests={"many": tiny.points(TESTS, 2)})
    pipeline = ip.Pipeline(experiment, folder / "cache", tiny.settings(s_test={"solver": "identity"}))
    pipeline.run()
    return {**found, "many": pipeline.report("many", folder / "many.html", k=4)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def view(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    """Return what opens a page; at the end nothing must have gone wrong in it, nor been asked of a network."""
    wrong: list[str] = []
    contexts = []

    def open_page(kind: str, address: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
        )
        page.goto(pages[kind].as_uri() + address)
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        return page

    yield open_page
    assert wrong == []
    for context in contexts:
        context.close()


def shown(page: Any) -> list[int]:
    """Return the ids of the tests at the top of the list, in their order."""
    return page.eval_on_selector_all(
        "#rows .row",
        "rows => rows.sort((a, b) => a.offsetTop - b.offsetTop).map(row => Number(row.querySelector('b').textContent))",
    )


def chosen(page: Any, test: int) -> None:
    """Wait until a test is shown."""
    page.wait_for_function("test => document.querySelector('#test h2')?.textContent === `Test ${test}`", arg=test)


def results(finished: Path) -> ip.Influences:
    return ip.Influences.open(finished, "holdout")


def test_a_test_is_shown_with_what_helps_and_harms_it(view: Open, finished: Path) -> None:
    page = view("pictures")
    chosen(page, 0)
    influences = results(finished)
    for number, (ids, scores) in enumerate((influences.helpful(4), influences.harmful(4))):
        section = page.locator("#test .ranking").nth(number)
        assert (
            section.locator(".card").evaluate_all("all => all.map(card => Number(card.dataset.id))") == ids[0].tolist()
        )
        first = float(section.locator(".score > span").first.inner_text().replace("−", "-"))
        assert first == pytest.approx(scores[0, 0], rel=6e-3)
    label = ["zero", "one", "two"][int(tiny.points(T, 2)[0][1])]
    assert f"label {label}" in page.locator("#test .labels").first.inner_text()
    image = page.locator("#test .of img")
    assert image.get_attribute("alt") == f"test 0, label {label}, 6 × 6 pixels"
    page.wait_for_function("[...document.querySelectorAll('#test img')].every(image => image.naturalWidth === 6)")
    assert page.locator("img:not([alt])").count() == 0


def test_search_filters_and_order_choose_tests(view: Open) -> None:
    page, points = view("many"), tiny.points(TESTS, 2)
    assert page.inner_text("#count") == f"{TESTS} tests"
    assert page.locator("#rows .row").count() < 40, "only rows that are seen exist"
    page.fill("#search", "59")
    page.wait_for_function("document.querySelector('#count').textContent.startsWith('11 of')")
    assert shown(page)[:3] == [59, 590, 591]
    chosen(page, 59)
    words = texts(points[7]).lower()
    same = [row for row in range(TESTS) if texts(points[row]).lower().find(words) >= 0]
    page.fill("#search", words)
    page.wait_for_function(
        "count => document.querySelector('#count').textContent === `${count} of 600 tests`", arg=len(same)
    )
    assert shown(page) == same[: len(shown(page))]
    page.fill("#search", "no such text")
    page.wait_for_function("document.querySelector('#test').textContent.includes('No test fits')")
    page.fill("#search", "")
    page.select_option("#label", "2")
    labels = [int(label) for _, label in points]
    count = labels.count(2)
    page.wait_for_function(
        "count => document.querySelector('#count').textContent === `${count} of 600 tests`", arg=count
    )
    assert all(labels[row] == 2 for row in shown(page))
    page.select_option("#right", "0")
    with torch.no_grad():
        outputs = tiny.model()(points.tensors[0])
    wrong = [row for row in range(TESTS) if labels[row] == 2 and outputs[row].argmax() != 2]
    page.wait_for_function(
        "count => document.querySelector('#count').textContent.startsWith(`${count} of`)", arg=len(wrong)
    )
    page.select_option("#label", "")
    page.select_option("#right", "")
    page.select_option("#sort", "loss")
    losses = torch.nn.functional.cross_entropy(outputs, points.tensors[1], reduction="none")
    page.wait_for_function("document.querySelector('#count').textContent === '600 tests'")
    assert shown(page)[:5] == losses.argsort(descending=True)[:5].tolist()
    page.click("#reverse")
    page.wait_for_function("document.querySelector('#reverse').getAttribute('aria-pressed') === 'true'")
    assert shown(page)[:5] == losses.argsort()[:5].tolist()
    page.select_option("#sort", "share")
    page.keyboard.press("Escape")
    assert len(shown(page)) > 3


def test_keys_go_through_tests_and_views(view: Open) -> None:
    page = view("many")
    chosen(page, 0)
    for key, test in (("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        chosen(page, test)
    page.focus("#list")
    page.keyboard.press("End")
    chosen(page, TESTS - 1)
    assert shown(page)[-1] == TESTS - 1
    assert page.get_attribute("#list", "aria-activedescendant") == f"row-{TESTS - 1}"
    assert page.get_attribute(f"#row-{TESTS - 1}", "aria-posinset") == str(TESTS)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("j")
    assert page.input_value("#search") == "j"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") != "search"
    for key, name in (("2", "training"), ("3", "scores"), ("1", "tests")):
        page.keyboard.press(key)
        assert page.locator("[role=tabpanel]:visible").evaluate_all("all => all.map(view => view.id)") == [
            f"view-{name}"
        ]
        assert page.get_attribute(f"#tab-{name}", "aria-selected") == "true"
    page.keyboard.press("?")
    assert page.locator("dialog#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog#keys").is_visible()
    page.keyboard.press("Control+j")
    page.focus("#tab-tests")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-training"


def test_an_address_names_a_test(view: Open) -> None:
    page = view("many", "#test=123")
    chosen(page, 123)
    page.keyboard.press("j")
    chosen(page, 124)
    assert page.url.endswith("#test=124")


def test_ticked_ids_are_saved(view: Open, finished: Path) -> None:
    page, influences = view("pictures"), results(finished)
    page.keyboard.press("2")
    mean = influences.mean_scores()
    harmful = [int(i) for i in influences.harmful_on_average(N)[0] if mean[i] < 0]
    cards = page.locator("#listed .card")
    cards.first.wait_for()
    assert cards.evaluate_all("all => all.map(card => Number(card.dataset.id))") == harmful[:48]
    assert page.is_disabled("#save-json")
    cards.nth(1).locator("input").check()
    page.keyboard.press("k")
    page.keyboard.press("x")
    assert page.inner_text("#ticked") == "2 ticked"
    for button, name in (("#save-json", "train-ids.json"), ("#save-text", "train-ids.txt")):
        with page.expect_download() as download:
            page.click(button)
        assert download.value.suggested_filename == name
        content = Path(download.value.path()).read_text(encoding="utf-8")
        if name.endswith("json"):
            assert json.loads(content) == {
                "training": "train",
                "tests": "holdout",
                "results": influences.key,
                "ids": sorted(harmful[:2]),
            }
        else:
            assert content == "".join(f"{i}\n" for i in sorted(harmful[:2]))
    page.reload()
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    page.keyboard.press("2")
    assert page.inner_text("#ticked") == "2 ticked", "they are remembered"
    page.click("#tick-none")
    assert page.inner_text("#ticked") == "none ticked"
    page.check("#listed-wrong")
    page.wait_for_function(
        "[...document.querySelectorAll('#listed .card')].every(card => card.querySelector('.wrong'))"
    )
    page.click("#tick-all")
    points = tiny.points(N, 1)
    wrong = [i for i in harmful if tiny.model()(points[i][0]).argmax() != points[i][1]]
    assert 0 < len(wrong) < len(harmful)
    assert page.inner_text("#ticked") == f"{len(wrong)} ticked"


def test_a_training_sample_opens_with_the_tests_it_weighs_on(view: Open, finished: Path) -> None:
    page, influences = view("pictures"), results(finished)
    chosen(page, 0)
    first = int(influences.helpful(4)[0][0, 0])
    page.locator("#test .card .open").first.click()
    dialog = page.locator("dialog#sample")
    dialog.wait_for(state="visible")
    assert dialog.locator("h2").inner_text() == f"Training sample {first}"
    helped = [row for row in range(T) if first in influences.helpful(4)[0][row]]
    assert f"Among the most helpful of {len(helped)} test" in dialog.inner_text()
    dialog.locator("input").check()
    other = next(row for row in helped if row != 0) if len(helped) > 1 else 0
    dialog.locator(".link", has_text=str(other)).first.click()
    chosen(page, other)
    assert page.evaluate("document.querySelector('#ticked').value") == "1 ticked"


def test_hostile_texts_are_shown_as_texts(view: Open) -> None:
    page, points = view("hostile"), tiny.points(T, 2)
    for row in range(T):
        chosen(page, row)
        assert page.locator("#test .of .text").evaluate("element => element.textContent") == (
            texts(points[row]).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
        label = page.locator("#test .about .label bdi").evaluate("element => element.textContent")
        assert label == HOSTILE[int(points[row][1])]
        page.keyboard.press("j")
    page.keyboard.press("2")
    page.locator("#listed .card").first.wait_for()
    assert page.evaluate("window.stolen") is None
    assert page.locator("img, main script, main style, [onmouseover], [onerror]").count() == 0
    assert page.locator("#label option").evaluate_all("all => all.slice(1).map(one => one.textContent)") == [
        f"{HOSTILE[label]} ({[int(y) for _, y in points].count(label)})"
        for label in sorted({int(y) for _, y in points})
    ]


def test_light_and_dark_follow_the_system_until_they_are_chosen(view: Open) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = view("values").evaluate(background), view("values", color_scheme="dark").evaluate(background)
    assert light == "rgb(255, 255, 255)"
    assert dark != light
    page = view("values", color_scheme="dark")
    page.keyboard.press("t")
    assert page.evaluate(background) == light
    page.click("#theme")
    assert page.evaluate(background) == dark


@pytest.mark.parametrize("kind", ["hostile", "pictures", "values"])
def test_a_narrow_screen_is_wide_enough(view: Open, kind: str) -> None:
    page = view(kind, viewport={"width": 380, "height": 800})
    for key in "123":
        page.keyboard.press(key)
        assert page.evaluate("document.documentElement.scrollWidth") <= 380, f"view {key}"
    page.keyboard.press("1")
    assert page.locator("#list").bounding_box()["width"] > 340


def test_everything_that_can_be_used_has_a_name(view: Open) -> None:
    page = view("pictures")
    chosen(page, 0)
    unnamed = page.evaluate("""
        [...document.querySelectorAll('button, input, select')].filter(element =>
            !(element.getAttribute('aria-label') || element.labels?.length || element.textContent.trim()
              || element.querySelector('img[alt]'))).map(element => element.outerHTML)
    """)
    assert unnamed == []
    assert page.get_attribute("html", "lang") == "en"
    page.keyboard.press("3")
    for chart in page.locator("svg[role=img]").all():
        for name in chart.get_attribute("aria-labelledby").split():
            assert page.locator(f"#{name}").evaluate("element => element.textContent.trim()")
