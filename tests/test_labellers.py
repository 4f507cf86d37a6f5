"""Rows and agreement by annotator and by group, on data whose agreement is known."""

import json
import random

import krippendorff
import numpy as np
import pytest

from instructlite.data.labellers import report_on


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def judged(number, first, **fields):
    """Pair `number`, of which the first answer or the second is preferred."""
    answers = [f"a{number}", f"b{number}"]
    return {"prompt": f"q{number}", "chosen": answers[not first], "rejected": answers[first], **fields}


def test_rows_and_agreement_by_annotator(tmp_path):
    votes = {"ann": [1, 1, 0, 1, 1], "bob": [1, 1, 0, 0, None], "eve": [0, 1, None, None, None]}
    items = [judged(n, vote, annotator=name) for name, given in votes.items() for n, vote in enumerate(given) if vote is not None]
    report = report_on([write(tmp_path / "data.jsonl", [*items, judged(9, 1)])])
    assert (report.rows, report.unnamed, report.shared) == (12, 1, 4)
    found = {row["name"]: (row["rows"], row["shared"], row["agreement"]) for row in report.annotators}
    assert found["ann"] == (5, 4, pytest.approx((0.5 + 1 + 1 + 0) / 4))
    assert found["bob"] == (4, 4, pytest.approx((0.5 + 1 + 1 + 0) / 4))
    assert found["eve"] == (2, 2, pytest.approx((0 + 1) / 2))
    table = [[np.nan if vote is None else vote for vote in given] for given in votes.values()]
    assert report.alpha == pytest.approx(krippendorff.alpha(table, level_of_measurement="nominal"))


def test_rankings_scores_and_comparisons_are_votes_on_the_same_pairs(tmp_path):
    scores = {"ann": [7, 4, 1], "bob": [6, 4, 4], "eve": [1, 4, 7]}
    likert = [{"prompt": "q", "responses": ["a", "b", "c"], "scores": given, "annotator": name} for name, given in scores.items()]
    report = report_on([write(tmp_path / "likert.jsonl", likert)])
    assert (report.shared, report.scored) == (3, 3)
    assert {row["name"]: row["shared"] for row in report.annotators} == {"ann": 3, "bob": 2, "eve": 3}  # of bob's three pairs one is tied
    assert report.score_alpha == pytest.approx(krippendorff.alpha(list(scores.values()), level_of_measurement="interval"))
    pairs = [
        {"prompt": "q", "chosen": "b", "rejected": "c", "annotator": "eve"},
        {"prompt": "q", "chosen": "c", "rejected": "a", "annotator": "zoe"},
    ]
    report = report_on([tmp_path / "likert.jsonl", write(tmp_path / "pairs.jsonl", pairs)])
    (zoe,) = (row for row in report.annotators if row["name"] == "zoe")
    assert (zoe["shared"], zoe["agreement"]) == (1, pytest.approx(1 / 3))
    (eve,) = (row for row in report.annotators if row["name"] == "eve")
    assert (eve["rows"], eve["shared"]) == (2, 3)  # her second vote on b and c is not another person's


def test_groups_are_told_by_the_usual_columns_or_by_those_named(tmp_path):
    items = []
    for n in range(40):
        for name, country, first in (("ann", "ES", 1), ("bob", "ES", n % 2), ("eve", "PE", n % 2)):
            items.append(judged(n, first, annotator=name, demographics={"country": country}, site=name.upper()))
    path = write(tmp_path / "data.jsonl", items)
    report = report_on([path])
    ((column, (spain, peru)),) = report.groups.items()
    assert column == "demographics.country"
    assert (spain["name"], spain["rows"], spain["agreement"]) == ("ES", 80, pytest.approx(0.75))
    assert (peru["name"], peru["rows"], peru["shared"], peru["agreement"], peru["alpha"]) == ("PE", 40, 40, pytest.approx(0.75), None)
    assert spain["alpha"] is not None
    assert set(report_on([path], by=["site"]).groups) == {"site"}


def test_groups_that_some_rows_have_and_others_lack_stay_with_their_votes(tmp_path):
    rng = random.Random(0)
    items = []
    for n in range(60):
        items.append(judged(n, 1, annotator="ann", **({"country": "ES"} if rng.random() < 0.5 else {})))
        items.append(judged(n, n % 3 == 0, annotator="bob", country="PE"))
    (spain,) = (row for row in report_on([write(tmp_path / "data.jsonl", items)]).groups["country"] if row["name"] == "ES")
    has = [n for n in range(60) if "country" in items[2 * n]]
    assert (spain["rows"], spain["shared"]) == (len(has), len(has))
    assert spain["agreement"] == pytest.approx(sum(n % 3 == 0 for n in has) / len(has))


def test_dates_and_flags_are_counted_by_annotator(tmp_path):
    items = [
        judged(0, 1, annotator="ann", created="2024-02-01", flags={"harmful": True, "hallucination": False}, fails_task=True),
        judged(1, 1, annotator="ann", created="2024-01-01", flags={"harmful": True}),
    ]
    (ann,) = report_on([write(tmp_path / "data.jsonl", items)]).annotators
    assert (ann["first"], ann["last"], ann["flags"]) == ("2024-01-01", "2024-02-01", {"flags.harmful": 2, "fails_task": 1})


def test_what_the_numbers_cannot_say_is_said(tmp_path):
    (note,) = report_on([write(tmp_path / "a.jsonl", [judged(0, 1)])]).notes
    assert "no row names who judged it" in note
    (note,) = report_on([write(tmp_path / "b.jsonl", [judged(0, 1, annotator="ann")])]).notes
    assert "no two annotators judged the same" in note
    swapped = [judged(n, name != "eve", annotator=name) for n in range(20) for name in ("ann", "bob", "eve")]
    fault, note = report_on([write(tmp_path / "c.jsonl", [*swapped, {"prompt": "?"}])]).notes
    assert fault.startswith("1 rows could not be read") and note == "eve agrees with the others in 0.00 of 20 votes, less than coins would"


def test_everybody_of_one_mind_gives_no_alpha_and_no_traceback(tmp_path):
    same = [{"prompt": "q", "responses": ["a", "b"], "scores": [7, 1], "annotator": name} for name in ("ann", "bob")]
    report = report_on([write(tmp_path / "data.jsonl", same)])
    assert report.alpha is None and report.score_alpha == pytest.approx(1.0)
    assert report_on([write(tmp_path / "none.jsonl", [])]).rows == 0
