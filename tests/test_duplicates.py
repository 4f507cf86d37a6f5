"""Copies, near-duplicates, prompt clusters and contradictions."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest

from instructlite.data import formats
from instructlite.data.preparing.duplicates import (
    Fingerprints,
    contradictions,
    exact_duplicates,
    key64,
    near_duplicates,
    prompt_clusters,
    words_of,
)
from instructlite.data.preparing.steps import Sample, StepCount
from instructlite.data.schema import KINDS

pytest.importorskip("rensa")


def pair(prompt: str, chosen: str, rejected: str, **more: object) -> Sample:
    record = {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, **more}
    return Sample(record, "comparisons", "f.jsonl", 1)


def answer(prompt: str, completion: str, **more: object) -> Sample:
    return Sample({"prompt": [{"role": "user", "content": prompt}], "completion": completion, **more}, "demonstrations", "f.jsonl", 1)


def printed(samples: list[Sample], near: bool = True) -> Fingerprints:
    prints = Fingerprints(near)
    prints.add(samples, KINDS)
    return prints


def starter(kind: str) -> list[Sample]:
    return [Sample(row.record, row.kind, row.file, row.line) for row in formats.rows("starter", kind)]


def edited(text: str, rng: random.Random) -> str:
    """One light change in forty words: a typo, a word more, less, twice or elsewhere, capitals, or other punctuation."""
    words = text.split(" ")
    for _ in range(1 + len(words) // 40):
        place = rng.randrange(len(words))
        change = rng.choice(["typo", "drop", "twice", "swap", "add", "capitals", "mark"])
        if change == "typo" and len(words[place]) > 4:
            words[place] = words[place][:2] + words[place][3:]
        elif change == "drop" and len(words) > 6:
            del words[place]
        elif change == "twice":
            words.insert(place, words[place])
        elif change == "swap" and place + 1 < len(words):
            words[place : place + 2] = words[place : place + 2][::-1]
        elif change == "add":
            words.insert(place, rng.choice(["really", "also", "very"]))
        elif change == "capitals":
            words[place] = words[place].upper()
        else:
            words[-1] = words[-1].rstrip(".?!") + "!"
    return " ".join(words)


def lightly_edited(sample: Sample, rng: random.Random) -> Sample:
    record = json.loads(json.dumps(sample.record))
    record["prompt"][-1]["content"] = edited(record["prompt"][-1]["content"], rng)
    for key in ("completion", "chosen", "rejected"):
        if key in record:
            record[key] = edited(record[key], rng)
    return Sample(record, sample.kind, "planted", 1)


@pytest.mark.parametrize("kind", ["demonstrations", "comparisons"])
def test_lightly_edited_copies_are_found_and_little_else(kind):
    samples, rng = starter(kind), random.Random(3)
    planted = [lightly_edited(sample, rng) for sample in rng.sample(samples, 50)]
    earlier = near_duplicates(printed([*samples, *planted]), 0.75)
    repeats = earlier != np.arange(len(earlier))
    assert repeats[len(samples) :].sum() >= 45
    assert repeats[: len(samples)].sum() <= 3


def clusters_of(samples: list[Sample], near: bool = True) -> np.ndarray:
    prints = printed(samples, near)
    return prompt_clusters(prints, near_duplicates(prints, 0.75))


def test_what_is_nearly_the_same_lies_in_one_cluster():
    samples, rng = starter("demonstrations"), random.Random(4)
    planted = [lightly_edited(sample, rng) for sample in samples]
    prints = printed([*samples, *planted])
    earlier = near_duplicates(prints, 0.75)
    clusters = prompt_clusters(prints, earlier)
    assert (clusters == clusters[earlier]).all()
    # Lightly edited prompts with other answers are no near-duplicates, but stay with theirs unless they are very short.
    for number, sample in enumerate(planted):
        sample.record["completion"] = samples[number - 7].record["completion"]
    clusters = clusters_of([*samples, *planted])
    apart = [sample.prompt for number, sample in enumerate(planted) if clusters[len(samples) + number] != clusters[number]]
    assert len(apart) < 0.2 * len(planted)
    assert all(len(words_of(prompt)) < 15 for prompt in apart)


LONG = "Here is a long passage about rivers and the towns on them, which is the same each time and longer than any answer could be. " * 3


@pytest.mark.parametrize(
    "first, second, repeats",
    [
        (answer("Who wrote Faust?", "Goethe wrote it."), answer("who  wrote Faust", "Goethe wrote it!"), True),
        (answer("What is the capital of France?", "Paris."), answer("What is the capital of Spain?", "Madrid."), False),
        (answer(f"{LONG} Which river?", "The Rhine"), answer(f"{LONG} Which town?", "Basel"), False),  # one long prompt, other answers
        (answer("Why?", f"{LONG}"), answer("How do I bake bread at home?", f"{LONG}"), False),  # one long answer, other prompts
        (pair("Why is the sky blue?", "Light scatters.", "No idea."), pair("Why is the sky blue?", "No idea.", "Light scatters."), False),
        (pair("Hi", "a b c", "d e f", annotator="ann"), pair("Hi", "a b c", "d e f", annotator="bob"), False),  # two votes
        (answer("Who?", "me"), pair("Who?", "me", "you"), False),
        (answer("东京是哪个国家的首都请回答", "是日本的首都"), answer("东京是哪个国家的首都请您回答", "是日本的首都"), True),
    ],
)  # fmt: skip
def test_what_a_near_duplicate_is(first, second, repeats):
    assert near_duplicates(printed([first, second]), 0.75).tolist() == ([0, 0] if repeats else [0, 1])


def test_many_alike_rows_all_repeat_the_first():
    assert set(near_duplicates(printed([answer("What is this thing?", f"{LONG} {i}") for i in range(500)]), 0.75)) == {0}


def test_conversations_that_open_alike_stay_together_without_signatures_too():
    samples = [answer("Hello  there", "a"), answer("Bye", "b"), answer("hello there", "c")]
    samples[2].record["prompt"] += [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "What is new?"}]
    assert clusters_of(samples, near=False).tolist() == [0, 1, 0]


def test_clusters_hang_together_through_others():
    base = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    chain = [" ".join([*base[:-1], f"x{i}"] if i == 0 else [*base[i:], *(f"y{j}" for j in range(i))]) for i in range(3)]
    clusters = clusters_of([answer(text, "a") for text in chain])
    assert clusters[1] == clusters[2]


def test_exact_duplicates_name_the_row_they_repeat():
    judge, count = exact_duplicates(), StepCount("exact duplicates")
    rows = [
        answer("A  b", "C"),
        answer("a b", "c"),
        answer("a b", "d"),
        answer("a b", "c", annotator="x"),
        answer("A b", "c", annotator="x"),
    ]
    for number, row in enumerate(rows, 1):
        row.line = number
    assert [judge(row, count) for row in rows] == [None, "exact duplicate: of f.jsonl:1", None, None, "exact duplicate: of f.jsonl:4"]


def test_contradictions_lose_to_the_majority_and_all_lose_without_one():
    def vote(prompt: str, first: bool, who: str) -> Sample:
        return pair(prompt, *("yes", "no")[:: 1 if first else -1], annotator=who)

    votes = [
        vote("p", True, "a"),
        vote("p", True, "b"),
        vote("p", False, "c"),
        vote("q", True, "a"),
        vote("q", False, "b"),
        vote("r", True, "a"),
    ]
    lost, contested = contradictions(printed(votes), np.ones(len(votes), bool))
    assert lost.tolist() == [False, False, True, True, True, False]
    assert contested == 2


def test_words_leave_case_and_punctuation_aside():
    assert words_of("Hello, World! 東京 ok") == ["hello", "world", "東", "京", "ok"]
    assert words_of("?! ...") == ["?!", "..."]


def test_keys_are_those_of_any_other_process():
    code = "from instructlite.data.preparing.duplicates import key64; print(key64('a', ['b', 1]))"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**__import__("os").environ, "PYTHONHASHSEED": "7"}
    )
    assert int(told.stdout) == key64("a", ["b", 1])
