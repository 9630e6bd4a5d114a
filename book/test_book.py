"""The built book in a real browser: what a reader sees, on every page.

`make book-test` builds it first. Each page is opened once, as wide as a telephone, and what it
shows is noted; the tests are about these notes.
"""

import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch

from drlora_ref import BudgetSchedule, ema_update

BOOK = Path(__file__).parent
BUILD = BOOK / "_build" / "html"
PAGES = sorted(path.relative_to(BUILD).as_posix() for path in BUILD.rglob("*.html"))
PAGES = [page for page in PAGES if not page.startswith("_")]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
LOOK = """async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const images = [...document.querySelectorAll("article img")];
  await Promise.all(images.map((image) => image.decode().catch(() => {})));
  const shown = (e) => e.getClientRects().length > 0;
  return {
    wide: document.documentElement.scrollWidth - window.innerWidth,
    math: document.querySelectorAll(".math").length,
    unrendered: [...document.querySelectorAll(".math")]
      .filter((e) => !e.querySelector("mjx-container svg") || e.querySelector("[data-mml-node=merror]"))
      .map((e) => e.textContent),
    silent: images.filter((i) => !i.alt || /^(data:|.*\\.(png|svg)$)/.test(i.alt)).map((i) => i.src),
    broken: images.filter((i) => shown(i) && !i.naturalWidth).map((i) => i.src),
    answers: document.querySelectorAll("article details").length,
    open: document.querySelectorAll("article details[open]").length,
  };
}"""


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A headless Chromium."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: install it to look at the book's pages")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def seen(browser) -> dict[str, dict]:
    """What each page shows, and what went wrong while it was loaded."""
    context = browser.new_context(viewport={"width": 390, "height": 800})
    notes = {}
    for name in PAGES:
        page = context.new_page()
        wrong: list[str] = []
        page.on(
            "console",
            lambda m, wrong=wrong: m.type in ("error", "warning") and wrong.append(m.text),
        )
        page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        page.on("requestfailed", lambda r, wrong=wrong: wrong.append(f"failed: {r.url}"))
        page.on(
            "request",
            lambda r, wrong=wrong: (
                r.url.startswith(("file:", "data:", "blob:")) or wrong.append(r.url)
            ),
        )
        page.goto((BUILD / name).as_uri())
        notes[name] = page.evaluate(LOOK) | {"wrong": wrong}
        page.close()
    context.close()
    return notes


@pytest.fixture
def page(browser):
    """A function that opens a page; wide, light, and with scripts, unless told otherwise."""
    contexts = []

    def open_page(name: str, **given):
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 900}, **given))
        opened = contexts[-1].new_page()
        opened.goto((BUILD / name).as_uri())
        return opened

    yield open_page
    for context in contexts:
        context.close()


def failing(seen: dict, name: str) -> dict:
    return {page: notes[name] for page, notes in seen.items() if notes[name]}


def test_every_page_loads_without_errors_and_from_here_alone(seen):
    assert len(seen) > 40 and not failing(seen, "wrong")


def test_formulas_are_rendered(seen):
    assert sum(notes["math"] for notes in seen.values()) > 100
    assert not failing(seen, "unrendered")


def test_pictures_are_there_and_have_words(seen):
    assert not failing(seen, "broken") and not failing(seen, "silent")


def test_no_page_is_wider_than_a_telephone(seen):
    assert not {page: notes["wide"] for page, notes in seen.items() if notes["wide"] > 0}


def test_answers_are_closed(seen):
    assert not {p: n["open"] for p, n in seen.items() if n["open"] and p != "print.html"}
    assert seen["notebooks/05_budget_schedule.html"]["answers"] >= 6


def hidden_cells(path: Path) -> int:
    cells = json.loads(path.read_text())["cells"]
    return sum("hide-cell" in cell["metadata"].get("tags", []) for cell in cells)


def test_an_answer_opens_on_a_click_also_without_scripts(page):
    source = BOOK / "_source" / "notebooks"
    for name in ("01_rank_one_components", "05_budget_schedule"):
        opened = page(f"notebooks/{name}.html", java_script_enabled=False)
        cells = opened.locator("details.hide")
        assert cells.count() >= hidden_cells(source / f"{name}.ipynb") > 0
        for box in (cells.first, opened.locator("details.answer").first):
            code = box.locator("pre").first
            assert not code.is_visible()
            box.locator("summary").first.click()
            assert code.is_visible()


def test_every_module_of_the_package_is_in_the_reference():
    there = "".join(path.read_text() for path in (BOOK / "_source" / "api").glob("*.md"))
    for file in (BOOK.parent / "drlora_ref").rglob("*.py"):
        name = ".".join(file.relative_to(BOOK.parent).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        assert f"## `{name}`" in there or name in ("drlora_ref", "drlora_ref.experiments"), name


def test_links_inside_are_whole():
    texts = {name: (BUILD / name).read_text() for name in PAGES}
    ids = {name: set(re.findall(r'\sid="([^"]+)"', text)) for name, text in texts.items()}
    bad = []
    for name, text in texts.items():
        for href in map(unescape, set(re.findall(r'<a\s[^>]*?href="([^"]+)"', text))):
            if "://" in href or href.startswith(("mailto:", "data:")):
                continue
            path, anchor = urldefrag(href)
            target = (BUILD / name).parent / unquote(path) if path else BUILD / name
            there = target.resolve().relative_to(BUILD.resolve()).as_posix()
            if not target.exists() or (
                anchor and there in ids and unquote(anchor) not in ids[there]
            ):
                bad.append((name, href))
    assert not bad


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_and_everything_can_be_reached(scheme, page):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    script = next(Path(axe.__file__).parent.rglob("axe*.js")).read_text()
    rules = {"runOnly": ["wcag2a", "wcag2aa"]}
    found = {}
    for name in ("index.html", "notebooks/05_budget_schedule.html", "paper/schedule.html"):
        opened = page(name, color_scheme=scheme)
        # No word is looked at while it fades in.
        opened.add_style_tag(
            content="* { animation: none !important; transition: none !important }"
        )
        opened.evaluate(
            "() => document.querySelectorAll('details').forEach((d) => (d.open = true))"
        )
        opened.evaluate(script)
        result = opened.evaluate("(rules) => axe.run(document, rules)", rules)
        for violation in result["violations"]:
            nodes = [
                (n["target"], n["any"][0]["message"] if n["any"] else "")
                for n in violation["nodes"]
            ]
            found[name, violation["id"]] = nodes[:4]
    assert not found


def test_the_search_finds_a_word(page):
    opened = page("search.html")
    opened.goto(f"{opened.url}?q=keep_count")
    opened.wait_for_selector("#search-results li a")
    assert "budget" in opened.locator("#search-results").inner_text().lower()


def test_the_film_is_stepped_through(page):
    opened = page("index.html")
    image, slider = opened.locator(".film img"), opened.locator(".film input")
    last = image.get_attribute("alt")
    slider.focus()
    opened.keyboard.press("Home")
    first = image.get_attribute("alt")
    assert first != last and "216 of 216" in first
    opened.get_by_role("button", name="Next").click()
    assert image.get_attribute("alt") not in (first, last)
    assert image.evaluate("(i) => i.decode().then(() => i.naturalWidth)") == 800
    frames = [path.read_bytes() for path in (BUILD / "_static" / "film").glob("frame_*.png")]
    assert len(set(frames)) == len(frames) == int(slider.get_attribute("max")) + 1


SCHEDULES = [
    dict(init_r=3, target_r=2, total_steps=1000, tinit=150, tfinal=500, deltaT=50, curve="paper"),
    dict(init_r=3, target_r=2, total_steps=1000, tinit=150, tfinal=500, deltaT=50, curve="adalora"),
    dict(init_r=12, target_r=8, total_steps=1000, tinit=0, tfinal=0, deltaT=7, curve="paper"),
    dict(init_r=16, target_r=1, total_steps=1000, tinit=490, tfinal=500, deltaT=200, curve="adalora"),
    dict(init_r=5, target_r=5, total_steps=1000, tinit=10, tfinal=980, deltaT=1, curve="paper"),
]  # fmt: skip


def test_the_budget_that_is_moved_is_the_packages(page):
    opened = page("notebooks/05_budget_schedule.html")
    for given in SCHEDULES:
        schedule, n = BudgetSchedule(**given), 72 * given["init_r"]
        theirs = opened.evaluate(
            "(given) => { const s = moving.schedule(given);"
            " return [s.events, Array.from({length: 1001}, (_, t) => s.kept(t))]; }",
            given | {"components": n},
        )
        steps = range(1001)
        assert theirs[0] == [t for t in steps if schedule.prunes_at(t)]
        assert theirs[1] == [schedule.keep_count(t, n) for t in steps]
    for wrong in (dict(target_r=4), dict(tinit=500, tfinal=500)):
        said = opened.evaluate("(given) => moving.schedule(given).error", SCHEDULES[0] | wrong)
        with pytest.raises(ValueError):
            BudgetSchedule(**SCHEDULES[0] | wrong)
        assert said


def test_the_score_that_is_moved_is_the_packages(page):
    raw = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    opened = page("notebooks/04_ema_smoothing.html")
    for beta in (0.0, 0.5, 0.97):
        average, ours = torch.zeros(()), []
        for score in raw:
            average = ema_update(average, score, beta)
            ours.append(average.item())
        theirs = opened.evaluate("([raw, beta]) => moving.smooth(raw, beta)", [raw.tolist(), beta])
        assert theirs == pytest.approx(ours, abs=1e-12)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("04_ema_smoothing", {"beta": "ArrowLeft", "noise": "End"}),
        ("05_budget_schedule", {"deltaT": "ArrowRight", "curve": "ArrowDown", "init_r": "End"}),
        ("08_planted_ranks", {"score": "ArrowDown", "noise": "ArrowUp"}),
    ],
)
def test_what_can_be_moved_is_moved_by_keyboard(name, keys, page):
    opened = page(f"notebooks/{name}.html")
    box = opened.locator(".move")
    for control, key in keys.items():
        before = box.locator(".picture").inner_html(), box.locator(".said").inner_text()
        box.locator(f"[name={control}]").focus()
        opened.keyboard.press(key)
        assert box.locator(".picture").inner_html() != before[0]
        assert box.locator(".said").inner_text() != before[1] or control == "noise"


def test_what_cannot_be_is_said_and_not_drawn(page):
    box = page("notebooks/05_budget_schedule.html").locator(".move")
    picture = box.locator(".picture").inner_html()
    box.locator("[name=target_r]").fill("9")
    assert "b(T) is above b(0)" in box.locator(".said").inner_text()
    assert box.locator(".picture").inner_html() == picture


def test_without_scripts_a_picture_stands_for_it(page):
    for name in ("04_ema_smoothing", "05_budget_schedule", "08_planted_ranks"):
        box = page(f"notebooks/{name}.html", java_script_enabled=False).locator(".move")
        assert box.locator("svg[role=img]").is_visible() and not box.locator("form").is_visible()


def test_found_ranks_on_show_are_those_of_the_record(page):
    table = json.loads((BOOK.parent / "results" / "found_ranks.json").read_text())
    run = next(r for r in table["runs"] if (r["score"], r["noise"]) == ("frobenius_norm", 0.5))
    planted = torch.tensor(table["planted_ranks"])
    misplaced = (torch.tensor(run["ranks"]) - planted).abs().sum(1).double().mean().item() / 2
    opened = page("notebooks/08_planted_ranks.html")
    opened.locator(".move [name=score]").select_option("frobenius_norm")
    said = opened.locator(".move .said").inner_text()
    assert said.startswith(f"{misplaced:.1f} of {planted.sum()} components")
