"""Plots are SVG that can stand in one page together: its colours, no names but their own, no text but as text."""

import re
from xml.etree import ElementTree

import pytest
from made_reports import NAMES, course, full, report

from instructlite.evaluation import plots

pytest.importorskip("matplotlib", reason="draws with matplotlib (the extra eval)")
EVIL = "$x^2$ <script>alert(1)</script> & #010101"


@pytest.fixture(scope="module")
def drawn():
    return plots.plots_of(full())


def test_there_is_a_plot_for_every_part_that_has_one(drawn):
    titles = {name: [plot.title for plot in found] for name, found in drawn.items()}
    assert titles["wins"] == ["Win rate against sft, T = 1", "Win rate against sft, greedy", "Win rate at T = 1 against sft, greedy"]
    assert titles["strengths"] == ["Strength by judge, T = 1"] and len(titles["distance"]) == 1
    assert len(titles["training-1"]) == len(course("ppo")["curves"]) == len(titles["training-2"])
    assert set(plots.plots_of(report())) == {"wins", "distance"}
    assert plots.plots_of(report(headline=None, win_rates=[])) == {}


def test_ids_are_the_pages_only_ones_and_references_lead_to_them(drawn):
    svgs = [plot.svg for found in drawn.values() for plot in found]
    ids = [name for svg in svgs for name in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(ids) == len(set(ids)) and all(name.startswith("plot-") for name in ids)
    for svg in svgs:
        used = set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg))
        assert used and used <= set(re.findall(r'\bid="([^"]*)"', svg))


def test_nothing_but_drawing_is_left_of_the_file(drawn):
    for plot in (plot for found in drawn.values() for plot in found):
        root = ElementTree.fromstring(plot.svg)
        assert root.attrib.keys() == {"viewBox", "role", "aria-labelledby"}
        tags = {element.tag for element in root.iter()}
        assert tags <= {"svg", "title", "desc", "defs", "g", "path", "use", "text", "clipPath", "rect"}, tags
        assert "http" not in plot.svg and root[0].text == plot.title and root[1].text == plot.description


def test_every_colour_is_the_pages(drawn):
    for plot in (plot for found in drawn.values() for plot in found):
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", plot.svg)) <= {"none", *plots.COLOURS.values()}
        assert "var(--c0)" in plot.svg


def test_names_are_text_and_no_formulas():
    names = tuple(EVIL if name == "ppo" else name for name in NAMES)
    found = [plot for found in plots.plots_of(full(names)).values() for plot in found]
    texts = [text for plot in found for text in ElementTree.fromstring(plot.svg).itertext()]
    assert any(text.strip() == EVIL[:35] + "…" for text in texts) and "<script" not in "".join(plot.svg for plot in found)


def test_a_pair_the_other_way_round_is_turned(drawn):
    """sft won 0.62 against base, so base won 0.38."""
    assert "base: by judge 0.38 (95 % interval 0.31 to 0.45)" in drawn["wins"][0].description


def test_best_of_n_stands_at_its_analytic_kl(drawn):
    (plot,) = drawn["distance"]
    assert "best-of-4, 0.636 nats from sft: by judge +0.24" in plot.description
    assert "best-of-4, analytic" in plot.svg and "in training ppo: score that PPO maximises goes from" in plot.description


def test_scores_that_were_not_logged_with_the_kl_have_no_curve():
    row = course("ppo")
    row["curves"]["watch/score"] = row["curves"]["watch/score"][1:]
    (plot,) = plots.plots_of(report(training=[row]))["distance"]
    assert "score that PPO maximises" in plot.svg and "held-out reward model" not in plot.svg


def test_the_users_matplotlibrc_is_neither_used_nor_changed():
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9}):
        assert plots.plots_of(report())["wins"] == plots.plots_of(report())["wins"]
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["lines.linewidth"] == 9
