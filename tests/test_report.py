"""The report shows text as text, and is whole as JSON, Markdown and on the terminal."""

import json
import math
from dataclasses import fields

import pytest
from made_reports import SAMPLED, candidate, full, report
from markdown_it import MarkdownIt

from instructlite.errors import InstructLiteError
from instructlite.evaluation.markdown import escape
from instructlite.evaluation.report import Report

EVIL = "<script>alert(1)</script> | **bold** [link](http://x.y) ![i](z) `code` <img src=x onerror=y>\n# Heading\n\n| a | b |\x1b[31m"


def test_text_of_prompts_and_answers_is_shown_as_text():
    found = report(text=EVIL, prompt=EVIL)
    markdown = found.to_markdown()
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    for live in ("<script", "<img", "<strong>bold", "<a ", "<code>code", "\x1b"):
        assert live not in page, live
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; | **bold** [link](http://x.y) ![i](z) `code`") == 3  # the prompt, two answers
    assert page.count("<h1>") == 1 and page.count("<table>") == MarkdownIt().enable("table").render(report().to_markdown()).count("<table>")


def test_names_are_shown_as_text_too():
    found = report(
        candidates=[candidate("sft"), candidate("<b>ppo</b>|x")],
        headline=["<b>ppo</b>|x", "sft"],
        win_rates=[],
        rewards=[],
        texts=[],
        samples=[],
    )
    found.win_rates = [SAMPLED | {"a": "<b>ppo</b>|x", "b": "sft", "judge": "judge", "decoding": "sampled", "prompts": 48}]
    found.sharpening = None
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(found.to_markdown())
    assert "<b>" not in page and "<td>&lt;b&gt;ppo&lt;/b&gt;|x</td>" in page
    assert "\x1b" not in str(report(headline=["ppo", "sft"], judges=[report().judges[0] | {"name": "judge"}], reference="s\x1b[31mft"))


@pytest.mark.parametrize(
    "text", ["[0.1, 0.2](http://x.y)", "[0.1, 0.2]: http://x.y", "![0.1, 0.2](x)", "a [link] (b)", "*_*", "&lt;b&gt;", "\\*a*"]
)
def test_escaped_text_renders_as_itself(text):
    page = MarkdownIt("commonmark", {"html": True}).renderInline(escape(text))
    assert page == MarkdownIt().renderInline("x").replace("x", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def test_line_breaks_and_control_characters_stay_within_a_cell():
    assert escape("a\r\nb\n\nc\u202ed\x00") == "a<br>b<br><br>c\ufffdd\ufffd"


def test_worst_losses_are_marked():
    markdown = report().to_markdown()
    assert "**Prompt 1**, one of the worst losses of ppo against sft" in markdown
    assert "not picked: it comes first in the data" in report(samples=[{"prompt": 0, "sample": 0, "why": "first"}]).to_markdown()


def test_answers_cut_by_the_limit_are_marked():
    found = report()
    found.answers[0]["answers"][0]["ended"] = False
    assert "| An answer. \\[…\\] | An answer. |" in found.to_markdown()


def test_the_terminal_shows_intervals_and_the_verdict():
    shown = str(report())
    assert "0.755 [0.677, 0.833]" in shown and "4.97 ± 0.30" in shown and "greedily" in shown
    assert max(map(len, shown.splitlines())) <= 110 and "\x1b" not in shown


def test_saved_json_holds_what_it_must_and_no_number_that_is_none(tmp_path):
    found = report(candidates=[candidate("sft", perplexity=math.inf), candidate("ppo", kl=math.nan)])
    found.save(tmp_path / "deep" / "report")
    content = json.loads((tmp_path / "deep" / "report" / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert {"name", "base", "adapter", "mean_reward", "mean_reward_low", "mean_reward_high", "kl", "perplexity", "length"} <= content[
        "candidates"
    ][0].keys()
    assert {"a", "b", "judge", "rate", "low", "high", "prompts", "decoding"} <= content["win_rates"][0].keys()
    assert [row["decoding"] for row in content["win_rates"]] == ["sampled", "greedy"]
    assert content["candidates"][0]["perplexity"] is None and content["candidates"][1]["kl"] is None
    assert "answers" not in content and content["reference"] == "sft"
    answers = [json.loads(line) for line in (tmp_path / "deep" / "report" / "answers.jsonl").read_text().splitlines()]
    assert answers == found.answers
    assert (tmp_path / "deep" / "report" / "report.md").read_text() == found.to_markdown()


def test_the_course_of_ppo_is_drawn_with_its_warnings():
    curves = {"objective/score": [0.0, 0.5, 1.0], "rollout/score_length_corr": [0.1, 0.1]}
    course = {"candidate": "ppo", "cycles": 3, "curves": curves, "health": {"kl_stop": "kl_stop in cycle 2: <b>"}}
    text = report(training=[course]).to_markdown()
    assert "## The training of ppo" in text and "ppo over 3 rollouts:\n\n|  | first | last | course |" in text
    assert "| 0.000 | 1.000 | ▁▅█ |" in text and "▄▄" in text
    assert "kl\\_stop in cycle 2: &lt;b&gt;" in text
    assert "No health check had anything to say." in report(training=[course | {"health": {}}]).to_markdown()
    assert "The training of" not in report().to_markdown()


def test_every_part_is_in_the_markdown_and_none_without_content_is():
    whole, small = full().to_markdown(), report().to_markdown()
    optional = (
        "## Strengths",
        "## Tax and side effects",
        "## Benchmarks",
        "## Time and memory",
        "Ratings:",
        "Krippendorff",
        "position bias",
    )
    for heading in optional:
        assert heading in whole and heading not in small, heading
    assert "| toxicity ↓ | red-team |" in whole and "- **Strength**" in whole and "**Strength**" not in small
    assert "- judge: position bias: in 40 of 90 pairs" in whole and "- **Toxicity**: " in whole


def test_a_report_of_format_1_is_read_and_what_is_no_report_is_refused(tmp_path):
    report().save(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["format"] == 2 and Report.load(tmp_path).to_dict() == content
    new = ("strengths", "agreement", "ratings", "side_effects", "benchmarks", "costs")
    old = {name: value for name, value in content.items() if name not in new} | {"format": 1}
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert Report.load(tmp_path).side_effects == [] and Report.load(tmp_path).verdict() == report().verdict()
    for wrong in ({**old, "format": 3}, {**old, "more": 1}, {name: value for name, value in old.items() if name != "judges"}, []):
        (tmp_path / "report.json").write_text(json.dumps(wrong))
        with pytest.raises(InstructLiteError, match="not a report of this version"):
            Report.load(tmp_path)


def test_a_loaded_report_says_all_but_the_answers():
    content = full().to_dict()
    assert {f.name for f in fields(Report)} == {*content, "answers"} - {"format"}
    loaded = Report(**{name: value for name, value in content.items() if name != "format"}, answers=[])
    assert loaded.verdict() == full().verdict() and "## Sample answers" not in loaded.to_markdown()
