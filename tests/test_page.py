"""The HTML page shows text as text, asks for nothing, and can be read in both themes, on a telephone, and without plots."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import chromium
from made_reports import NAMES, full, report

from instructlite.evaluation import plots

CALL = "window.ran = 1"
PAYLOADS = [
    f"<script>{CALL}</script>", f"</script><script>{CALL}</script>", f"<img src=x onerror='{CALL}'>", f"<svg onload={CALL!r}>",
    f"</title><script>{CALL}</script>", f"</style><script>{CALL}</script>", f"--><script>{CALL}</script>", f"]]><script>{CALL}</script>",
    f"\"><script>{CALL}</script>", f"\" autofocus onfocus=\"{CALL}", f"' onmouseover='{CALL}", f"<a href=\"javascript:{CALL}\">x</a>",
    "<iframe src='http://leak.example/'></iframe>", "<iframe srcdoc=\"<script>parent.ran=1</script>\"></iframe>",
    "<link rel=stylesheet href='http://leak.example/a.css'>", "<style>@import 'http://leak.example/b.css';</style>",
    "<meta http-equiv=refresh content='0;url=http://leak.example/'>", "<base href='http://leak.example/'>",
    f"<details open ontoggle='{CALL}'>", f"<body onload='{CALL}'>", "{{ cycler.__init__.__globals__ }}", "{% raw %}{{ 7*7 }}",
    f"<math><mtext></mtext><script>{CALL}</script></math>", f"<svg><animate onbegin='{CALL}' attributeName=x>",
    "$\\frac{1}{2}$ \x1b[31m\u202e",
    f"<template><script>{CALL}</script></template>", "&lt;script&gt;", f"<object data='data:text/html,<script>{CALL}</script>'></object>",
]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def hostile():
    """Every payload in a prompt, an answer, a name and a warning."""
    cycle = itertools.cycle(PAYLOADS)
    found = full(tuple(f"{next(cycle)} {name}" for name in NAMES), text="\n".join(PAYLOADS), prompt=" ".join(PAYLOADS))
    found.judges = [judge | {"warnings": PAYLOADS} for judge in found.judges]
    found.training[0]["health"] = {payload: payload for payload in PAYLOADS}
    found.base = found.base | {"id": PAYLOADS[0]}
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Both pages, written once."""
    made = {"full": full(), "hostile": hostile()}
    return {name: _saved(found, tmp_path_factory.mktemp(name)) for name, found in made.items()}


def _saved(found, directory):
    found.save(directory)
    return directory / "report.html"


@pytest.fixture(scope="module")
def page(places):
    return places["full"].read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_and_holds_no_script(page):
    policy = next(attrs for _, attrs in Tags(page).found if attrs.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'") and "script" not in policy
    for tag, attrs in Tags(page).found:
        assert tag not in ("script", "link", "img", "iframe", "object", "form", "base"), tag
        assert not {name for name in attrs if name.startswith("on") or name == "src"}, attrs
        assert attrs.get("href", "#").startswith("#"), attrs
    assert not re.search(r"url\((?!#)|@import|http://(?!www\.w3\.org/2000/svg)|https://", page)


def test_the_parts_stand_in_order(page):
    wanted = ["next", "wins", "candidates", "strengths", "decodings", "judges", "effects", "benchmarks", "distance"]
    wanted += ["training-1", "training-2", "costs", "samples", "how", "run"]
    tags = Tags(page).found
    assert [attrs["id"] for tag, attrs in tags if tag == "section"] == wanted
    assert [attrs["href"][1:] for tag, attrs in tags if tag == "a"] == wanted
    assert page.index('class="lead"') < page.index('class="figures"') < page.index("<nav")


def test_what_is_not_known_is_not_there():
    small = report().to_html()
    assert 'id="wins"' in small and not re.search(r'id="(strengths|effects|benchmarks|costs|training)', small)
    alone = report(headline=None, win_rates=[], sharpening=None, training=[], texts=[], samples=[], seconds={}, judges=[]).to_html()
    assert 'id="candidates"' in alone and 'class="figures"' not in alone and 'id="next"' not in alone


def test_tables_and_plots_have_names_for_who_cannot_see_them(page):
    assert page.count("<table") == page.count("<caption>") == page.count('role="region" tabindex="0"')
    assert page.count("<svg ") == page.count('role="img"') == page.count("<figcaption>") > 10
    assert re.findall(r"<h1>", page) == ["<h1>"]


def test_without_matplotlib_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    bare = full().to_html()
    assert "<svg" not in bare and bare.count("pip install &#39;instructlite[eval]&#39;") == 1
    assert "▁" in bare and not re.search(r"<details><summary>ppo over", bare)


def test_payloads_are_text_in_the_source(places, page):
    tags = Tags(source := places["hostile"].read_text(encoding="utf-8")).found
    assert {tag for tag, _ in tags} == {tag for tag, _ in Tags(page).found}
    assert not [attrs for _, attrs in tags if any(name.startswith("on") for name in attrs)]
    assert "49" not in re.findall(r"raw %\}(.{0,12})", source) and "\x1b" not in source and "\u202e" not in source


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def opened(browser, path: Path, width: int = 390, theme: str = "light"):
    """The page, and what it asked for."""
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    return tab, asked


def test_no_payload_runs_and_no_request_leaves(browser, places):
    tab, asked = opened(browser, places["hostile"])
    assert len(PAYLOADS) > 20
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    tab.mouse.wheel(0, 20000)
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.ran") is None and asked == [places["hostile"].as_uri()]
    shown = tab.inner_text("#training-1 ul")
    for payload in PAYLOADS:
        assert payload.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd") in shown, payload
    tab.close()


@pytest.mark.parametrize("name", ["full", "hostile"])
def test_on_a_telephone_nothing_is_wider_than_the_screen(browser, places, name):
    for width in (390, 1280):
        tab, _ = opened(browser, places[name], width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        boxes = "[...document.querySelectorAll('main > *, section > *, figure, .answer')]"
        outside = f"{boxes}.filter(each => each.getBoundingClientRect().right > innerWidth).map(each => each.outerHTML.slice(0, 80))"
        assert tab.evaluate(outside) == []
        tab.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_in_both_themes(browser, places, theme):
    tab, _ = opened(browser, places["full"], 1280, theme)
    colours = tab.evaluate("""() => {
        const style = getComputedStyle(document.documentElement), texts = [...document.querySelectorAll('svg text')];
        const of = name => style.getPropertyValue('--' + name).trim();
        return {paper: of('paper'), soft: of('soft'), ink: of('ink'), dim: of('dim'),
                texts: [...new Set(texts.map(each => getComputedStyle(each).fill))],
                series: [0, 1, 2, 3].map(i => of('c' + i)), body: getComputedStyle(document.body).backgroundColor};
    }""")
    tab.close()
    for ground in (colours["paper"], colours["soft"]):
        assert contrast(colours["ink"], ground) >= 7 and contrast(colours["dim"], ground) >= 4.5
        assert all(contrast(series, ground) >= 4.5 for series in colours["series"])
    assert luminance(colours["body"]) > 0.9 if theme == "light" else luminance(colours["body"]) < 0.05
    assert {luminance(text) for text in colours["texts"]} == {luminance(colours["ink"]), luminance(colours["dim"])}


def luminance(colour: str) -> float:
    """Of WCAG 2: relative, from #rgb, #rrggbb or rgb(r, g, b)."""
    digits = colour.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) for i in (0, 2, 4)] if "(" not in colour else [int(part) for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_rules_of_accessibility_hold(browser, page, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    (tmp_path / "open.html").write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", page), encoding="utf-8"
    )  # axe is a script, which the page forbids
    tab, _ = opened(browser, tmp_path / "open.html")
    found = axe.Axe().run(tab).response["violations"]
    tab.close()
    assert [(rule["id"], node["html"][:90]) for rule in found for node in rule["nodes"]] == []
