"""The leak check: planted evaluation texts are found, and common words are no leak."""

import random

import pytest

from instructlite.data import formats
from instructlite.data.preparing.leaks import EvaluationSet, evaluation_texts, leaks
from instructlite.data.preparing.steps import Sample, StepCount


def starter(kind: str) -> list[Sample]:
    return [Sample(row.record, row.kind, row.file, row.line) for row in formats.rows("starter", kind)]


def test_planted_leaks_are_all_found_and_nothing_else():
    rows, held = starter("demonstrations"), random.Random(1).sample(starter("comparisons"), 20)
    judge, count = leaks(EvaluationSet(evaluation_texts(held))), StepCount("leaks")
    before = [judge(row, count) for row in rows]
    planted = []
    for number, (row, leak) in enumerate(zip(rows, held, strict=False)):
        text = leak.turns[-1]["content"].upper().replace(" ", "  ").replace(",", " ;")
        turns = [{"role": "user", "content": text}] if number % 2 else [{"role": "user", "content": f"Question:\n{text}\nAnswer:"}]
        planted.append(Sample({**row.record, "prompt": turns}, row.kind, "planted", number))
    found = [judge(row, count) for row in planted]
    short = [leak for leak, reason in zip(held, found, strict=True) if reason is None]
    assert all(len(leak.turns[-1]["content"].split()) < 4 for leak in short)  # "Ok?" inside a longer text is nobody's
    assert sum(map(bool, found)) >= 20 - len(short)
    assert sum(map(bool, before)) <= 1


@pytest.mark.parametrize(
    "evaluated, text, leaked",
    [
        ("Who wrote it?", "who wrote  IT", True),
        ("Who wrote it?", "Tell me who wrote it", False),
        ("What is the capital of France?", "Hm. What is the capital of France?", True),
        ("What is the capital of France?", "What is the capital of Spain?", False),
        ("What is the capital of France?", "Essay. " + "filler words " * 30 + "what is the capital of France", False),
        ("How many planets are there in our own solar system today", "How many planets are there in our own solar system now", True),
        ("a b c d e f g h i j k l m n o p q r s t", "x " * 50 + "a b c d e f g h i j" + " y" * 50, True),
        ("a b c d e f g h i j k l m n o p q r s t", "x " * 50 + "a b c d e f g h" + " y" * 50, False),
    ],
)
def test_how_much_is_a_leak(evaluated, text, leaked):
    assert EvaluationSet([("e:1", evaluated)]).leaked(text) == ("e:1" if leaked else None)


def test_answers_leak_too_but_short_ones_are_nobodys():
    long = "the mitochondrion is the powerhouse of the cell as everybody knows"
    held = [
        Sample({"prompt": [{"role": "user", "content": "q one"}], "completion": answer}, "demonstrations", "e", 1)
        for answer in (long, "Paris")
    ]
    assert [text for _, text in evaluation_texts(held)] == ["q one", long, "q one"]
