"""The report says what the numbers say and no more, shows text as text, and is whole as JSON."""

import json
import math

import pytest
from markdown_it import MarkdownIt

from instructlite.evaluation.report import Report, escape

# What the greedy control in a first prototype showed: a clear gain when sampled, three quarters of it sharpening.
SAMPLED = {"rate": 0.755, "low": 0.677, "high": 0.833, "gain": 0.445, "gain_low": 0.3, "gain_high": 0.59}
GREEDY = {"rate": 0.635, "low": 0.49, "high": 0.771, "gain": 0.121, "gain_low": -0.05, "gain_high": 0.3}
SHARPENING = {"a": "ppo", "b": "sft", "judge": "judge", "share": 0.744, "share_low": 0.4, "share_high": 0.98}
EVIL = "<script>alert(1)</script> | **bold** [link](http://x.y) ![i](z) `code` <img src=x onerror=y>\n# Heading\n\n| a | b |\x1b[31m"


def candidate(name, **changes):
    row = {
        "name": name, "base": "tiny", "adapter": None if name == "base" else name * 8, "mean_reward": 0.1, "mean_reward_low": 0.0,
        "mean_reward_high": 0.2, "kl": None, "kl_standard_error": None, "perplexity": None, "length": 20.5, "ended": 0.98,
        "distinct_2": 0.8, "repeated_trigrams": 0.004,
    }  # fmt: skip
    return row | changes


def report(sampled=SAMPLED, greedy=GREEDY, sharpening=SHARPENING, text="An answer.", prompt="A question?", **changes):
    pair = {"a": "ppo", "b": "sft", "judge": "judge", "prompts": 48}
    wins = [pair | {"decoding": "sampled"} | sampled] + ([pair | {"decoding": "greedy"} | greedy] if greedy else [])
    names = ("sft", "ppo")
    decodings = [row["decoding"] for row in wins]
    reward = {"judge": "judge", "mean_reward": 0.1, "mean_reward_low": 0.0, "mean_reward_high": 0.2}
    words = {"length": 20.5, "ended": 0.98, "distinct_2": 0.8, "repeated_trigrams": 0.004}
    answer = {"decoding": "sampled", "sample": 0, "text": text, "tokens": 5, "ended": True, "scores": {"judge": 0.25}}
    judge = {
        "name": "judge", "adapter": "j" * 8, "accuracy": 0.691, "accuracy_low": 0.609, "accuracy_high": 0.763, "pairs": 136,
        "longer_wins": 0.574, "trained": [], "not_trained": ["ppo"],
    }  # fmt: skip
    values = dict(
        base={"id": "tiny", "revision": None, "fingerprint": "f" * 8, "quantization": "none", "dtype": "float32"},
        settings={"prompts": 48, "samples": 2, "temperature": 1.0, "greedy": bool(greedy)},
        reference="sft",
        headline=["ppo", "sft"],
        candidates=[
            candidate("sft", kl=0.0, kl_standard_error=0.0, perplexity=12.1),
            candidate("ppo", kl=4.97, kl_standard_error=0.3, perplexity=13.5),
        ],
        judges=[judge],
        win_rates=wins,
        rewards=[reward | {"candidate": name, "decoding": decoding} for decoding in decodings for name in names],
        texts=[words | {"candidate": name, "decoding": decoding} for decoding in decodings for name in names],
        sharpening=sharpening,
        samples=[{"prompt": 0, "sample": 0, "why": "loss"}],
        seconds={"load": 1.5},
        training=[],
        answers=[{"prompt": [{"role": "user", "content": prompt}], "answers": [answer | {"candidate": name} for name in names]}],
    )
    return Report(**(values | changes))


def test_the_first_words_name_gain_doubt_temperature_and_the_share_of_sharpening():
    first, second = report().verdict().split("\n\n")
    for words in (
        "48 held-out prompts with 2 answers each, sampled at temperature 1, the distribution that was trained",
        "ppo wins 0.755 (95 % interval 0.677 to 0.833) of the comparisons with sft",
        "clear of 0.5: when sampled so, ppo's answers score better",
        "+0.445 (95 % interval +0.300 to +0.590)",
        "Decoded greedily, ppo wins 0.635 (95 % interval 0.490 to 0.771), which holds 0.5, so no difference is shown then",
        "sft reaches 74 % (95 % interval 40 % to 98 %) untrained, just by greedy decoding",
        "not all of it",
    ):
        assert words in first, first
    for words in (
        "a reward model that ppo was not trained on; no person was asked",
        "agrees with people on 0.691 (95 % interval 0.609 to 0.763)",
        "ppo is 5.0 nats an answer away from sft",
        "sft 12.10, ppo 13.50",
    ):
        assert words in second, second
    assert report().to_markdown().split("\n\n")[1] == first


@pytest.mark.parametrize(
    ("low", "high", "words", "never"),
    [
        (0.45, 0.833, "show no difference", "better"),
        (0.5, 0.833, "show no difference", "better"),
        (0.2, 0.45, "score worse", "better"),
        (None, None, "too few prompts for an interval", "better"),
        (0.501, 0.833, "score better", "no difference"),
    ],
)
def test_no_more_is_claimed_than_the_interval_says(low, high, words, never):
    verdict = report(SAMPLED | {"low": low, "high": high}, greedy=None, sharpening=None).verdict()
    assert words in verdict and never not in verdict


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.51, 0.7, "clear of 0.5."), (0.2, 0.49, "does worse then"), (0.5, 0.7, "no difference is shown then")]
)
def test_the_greedy_win_rate_is_read_by_its_interval(low, high, words):
    assert words in report(greedy=GREEDY | {"low": low, "high": high}).verdict().split("Decoded greedily")[1]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.4, 1.2, "may explain all"), (-0.1, 0.3, "does not explain it"), (-0.8, 1.4, "too wide an interval"), (0.4, 0.98, "but not all")],
)
def test_the_share_of_sharpening_is_read_by_its_interval(low, high, words):
    assert words in report(sharpening=SHARPENING | {"share_low": low, "share_high": high}).verdict()


def test_a_gain_without_a_greedy_control_says_what_is_not_known():
    assert "how much of this is only a sharper distribution is not known" in report(greedy=None, sharpening=None).verdict()


def test_another_temperature_is_not_called_the_trained_one():
    verdict = report(settings={"prompts": 48, "samples": 2, "temperature": 0.7}).verdict()
    assert "temperature 0.7, ppo" in verdict and "that was trained" not in verdict


def test_a_judge_that_trained_the_candidate_is_no_evidence_and_a_weak_one_is_called_so():
    judge = report().judges[0]
    own = report(judges=[judge | {"trained": ["ppo"], "not_trained": []}]).verdict()
    assert "the reward model that ppo was trained on (no independent evidence)" in own
    assert "not shown to be better than chance" in report(judges=[judge | {"accuracy_low": 0.5}]).verdict()
    silent = report(judges=[judge | {"accuracy": None, "accuracy_low": None, "accuracy_high": None, "not_trained": []}]).verdict()
    assert "The judge is judge; no person" in silent and "agrees with people" not in silent


def test_one_candidate_alone_is_not_compared():
    alone = report(candidates=[candidate("sft")], headline=None, win_rates=[], sharpening=None, samples=[])
    assert (
        alone.verdict() == "On 48 held-out prompts with 2 answers each, sft's mean reward by judge is 0.100 (95 % interval 0.000 to 0.200)."
    )
    assert "mean reward" in str(alone) and "# sft" in alone.to_markdown()


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
    assert "## The training of ppo" in text and "| over 3 rollouts | first | last | course |" in text
    assert "| 0.000 | 1.000 | ▁▅█ |" in text and "▄▄" in text
    assert "kl\\_stop in cycle 2: &lt;b&gt;" in text
    assert "No health check had anything to say." in report(training=[course | {"health": {}}]).to_markdown()
    assert "The training of" not in report().to_markdown()
