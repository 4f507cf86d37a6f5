"""Use cases: told, measured, sampled towards."""

import numpy as np
import pytest

from instructlite.data import formats
from instructlite.data.preparing.mixture import (
    INSTRUCTGPT,
    category,
    category_of,
    choose,
    classifier_accuracy,
    distance,
    read_mix,
    towards,
    use_case_features,
)
from instructlite.data.preparing.steps import Sample
from instructlite.errors import InstructLiteError


def asking(*texts: str, **more: object) -> Sample:
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return Sample({"prompt": turns, "completion": "x", **more}, "demonstrations", "f", 1)


@pytest.mark.parametrize(
    "sample, expected",
    [
        (asking("x", category="Open QA"), ("open_qa", True)),
        (asking("x", category="creative_writing"), ("generation", True)),
        (asking("Hi", "Hello", "Tell me a joke"), ("chat", False)),
        (asking("Please rewrite this sentence: he go home"), ("rewrite", False)),
        (asking("Write a poem about autumn"), ("generation", False)),
        (asking("Give me a list of ten ideas for a birthday party"), ("brainstorming", False)),
        (asking("Who was the first president of the United States?"), ("open_qa", False)),
        (asking("Summarize the following text\n\n" + "Rivers flow to the sea. " * 20), ("summarization", False)),
        (asking("Classify each of the following as a fruit or a vegetable: apple, leek, pear"), ("classification", False)),
    ],
)
def test_the_use_case_of_a_row(sample, expected):
    assert category(sample) == expected


def test_the_classifier_agrees_with_the_labels_of_the_starter_data():
    rows = [Sample(row.record, row.kind, row.file, row.line) for row in formats.rows("starter", "demonstrations")]
    labelled = [sample for sample in rows if "category" in sample.record]
    right = sum(category_of(use_case_features(sample)) == sample.record["category"] for sample in labelled)
    assert len(labelled) >= 150
    assert right / len(labelled) > 0.85
    assert 0.85 < classifier_accuracy()["accuracy"] < 1


def test_instructgpts_shares_are_those_of_its_table():
    assert sum(INSTRUCTGPT.values()) == pytest.approx(1, abs=0.002)  # the table's are rounded
    assert read_mix("instructgpt")["generation"] == pytest.approx(0.456, abs=0.001)


def test_the_distance_is_the_share_of_rows_that_would_have_to_change():
    assert distance({"a": 50, "b": 50}, {"a": 0.75, "b": 0.25}) == pytest.approx(0.25)
    assert distance({"a": 3}, {"b": 1.0}) == 1
    assert distance({}, {"b": 1.0}) == 0


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.1, 0.3, 1.0])
def test_sampling_keeps_as_many_rows_as_the_distance_allows(tolerance):
    counts, target = {"a": 1000, "b": 100, "c": 10, "z": 500}, {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.1}
    had = {"a": 0.5 / 0.9, "b": 0.3 / 0.9, "c": 0.1 / 0.9}  # nothing is to be had of d
    taken = towards(counts, target, tolerance)
    assert all(taken[name] <= counts[name] for name in counts)
    assert distance(taken, had) <= tolerance + 0.01
    if tolerance == 0:
        assert sum(taken.values()) == pytest.approx(90, abs=3)  # ten rows of c are a ninth
    if tolerance == 1:
        assert sum(taken.values()) >= 1600
    assert sum(taken.values()) <= sum(towards(counts, target, min(tolerance + 0.1, 1)).values())


def test_rows_over_the_quota_go_in_the_order_of_their_keys():
    surplus = choose(np.array([0, 0, 0, 1]), np.array([3, 1, 2, 0], np.uint64), np.array([True, True, True, False]), {0: 2, 1: 0})
    assert surplus.tolist() == [True, False, False, False]


@pytest.mark.parametrize("given", [{}, {"a": "x"}, {"a": -1}, "no/such.yaml"])
def test_a_mix_that_is_none_is_refused(given):
    with pytest.raises(InstructLiteError, match="mix="):
        read_mix(given)


def test_a_mix_from_a_file_is_scaled_to_one(tmp_path):
    (tmp_path / "mix.yaml").write_text("generation: 3\nopen_qa: 1\n")
    assert read_mix(str(tmp_path / "mix.yaml")) == {"generation": 0.75, "open_qa": 0.25}
