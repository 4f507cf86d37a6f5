"""What the quality rules and filters take for bad, and what not."""

import pytest

from instructlite.data.preparing.filters import language, length, normalise, toxicity
from instructlite.data.preparing.quality import quality
from instructlite.data.preparing.steps import Sample, StepCount
from instructlite.errors import InstructLiteError


def row(prompt: str = "How do I boil an egg?", completion: str = "In water.", **more: object) -> Sample:
    return Sample({"prompt": [{"role": "user", "content": prompt}], "completion": completion, **more}, "demonstrations", "f", 1)


def broken(sample: Sample) -> list[str]:
    """Every rule that the row breaks."""
    count = StepCount("quality")
    rules = ("template residue", "answer repeats the prompt", "refusal", "answer breaks off")
    assert quality(dict.fromkeys(rules, "count"), str)(sample, count) is None
    return sorted(count.noticed)


@pytest.mark.parametrize(
    "completion, rules",
    [
        ("In water.", []),
        ("How do I boil an egg? In water.", ["answer repeats the prompt"]),
        ("how do I  boil an egg?", ["answer repeats the prompt"]),
        ("Boil it.<|im_end|>", ["template residue"]),
        ("Boil it.</s>", ["template residue"]),
        ("### Response:\nBoil it.", ["template residue"]),
        ("Human: boil it.", ["template residue"]),
        ("In HTML <s>old</s> is struck out, as is [this].", []),
        ("## Instructions\n1. Boil.", []),
        ("I'm sorry, but I can't help with that.", ["refusal"]),
        ("As an AI language model, I have no eggs.", ["refusal"]),
        ("I’m unable to assist with this request.", ["refusal"]),
        ("I am sorry to hear that you can't boil eggs. Do this.", []),
        ("Take a pot, fill it with water and put it on the", ["answer breaks off"]),
        ("Take these things: a pot, water,", ["answer breaks off"]),
        ("Run this in a shell first:\n```\nboil egg", ["answer breaks off"]),
        ("- water\n- a pot\n- an egg and some salt", []),
    ],
)
def test_what_each_rule_finds(completion, rules):
    assert broken(row(completion=completion)) == rules


def test_a_question_that_goes_on_as_the_answer_is_no_repetition():
    assert broken(row("Who is the best driver", "Who is the best driver has been debated for years.")) == []


def test_a_rejected_answer_may_be_bad_but_for_residue():
    def pair(rejected: str) -> Sample:
        return Sample(
            {"prompt": [{"role": "user", "content": "Say hello to me now"}], "chosen": "Hello.", "rejected": rejected},
            "comparisons",
            "f",
            1,
        )

    assert broken(pair("I'm sorry, but I can't help with that.")) == []
    assert broken(pair("Say hello to me now")) == []
    assert broken(pair("Hello<|endoftext|>")) == ["template residue"]


def test_rules_drop_count_or_rest():
    sample, count = row(completion="I'm sorry, but I can't help."), StepCount("quality")
    assert quality({"refusal": "drop"}, str)(sample, count) == "refusal"
    assert quality({"refusal": "off"}, str)(sample, count) is None
    assert not count.noticed
    with pytest.raises(InstructLiteError, match="rules: template residue"):
        quality({"refusals": "drop"}, str)


def test_the_best_answer_of_a_ranking_is_judged():
    record = {"prompt": [{"role": "user", "content": "q"}], "responses": ["I cannot help you with it", "Sure."], "ranks": [1, 0]}
    sample = Sample(record, "rankings", "f", 1)
    assert sample.best == "Sure."
    assert broken(sample) == []


def test_normalising_changes_unicode_line_ends_and_the_edges_only():
    sample, count = row("cafe\u0301\u2028x² \r\n y\ufeff", "a\rb  c", note="e\u0301"), StepCount("n")
    assert normalise(sample, count) is None
    assert (sample.turns[0]["content"], sample.best, sample.record["note"]) == ("café\nx² \n y", "a\nb  c", "e\u0301")
    assert count.changed.total() == 1
    assert normalise(row(), count) is None and count.changed.total() == 1
    assert normalise(row(completion="\ufeff"), count) == "empty after normalisation"


def test_lengths_are_limits_of_characters():
    judge, count = length(5, 30, 20), StepCount("length")
    assert judge(row(), count) is None
    assert judge(row(completion="1234"), count) == "answer too short: 4 characters, at least 5"
    assert judge(row(completion="1" * 21), count) == "answer too long: 21 characters, at most 20"
    assert judge(row("p" * 31), count) == "prompt too long: 31 characters, at most 30"


def test_rows_in_another_language_go_and_short_ones_stay():
    pytest.importorskip("py3langid")
    judge, count = language(["en"]), StepCount("language")
    assert judge(row(), count) is None
    german = row("Wie koche ich ein weiches Ei, ohne dass es platzt?", "Man legt es in kaltes Wasser und wartet dann einige Minuten.")
    assert judge(german, count) == "in another language (de)"
    assert language(["en", "de"])(german, count) is None
    assert judge(row("Wie geht es?", "Gut."), count) is None
    with pytest.raises(InstructLiteError, match="language=xx"):
        language(["xx"])


def test_a_scorer_of_ones_own_judges_the_good_answer():
    judge = toxicity(lambda texts: [0.99 if "bad" in text else 0.1 for text in texts], 0.9)
    assert judge([row(completion="bad"), row("bad", "good")], StepCount("t")) == ["toxic: 0.99", None]
    with pytest.raises(InstructLiteError, match="toxicity=no_such_module:score"):
        toxicity("no_such_module:score", 0.9)


def test_profanity_is_scored_by_its_library():
    pytest.importorskip("profanity_check")
    assert [bool(reason) for reason in toxicity("profanity", 0.9)([row(completion="you fucking idiot"), row()], StepCount("t"))] == [
        True,
        False,
    ]
