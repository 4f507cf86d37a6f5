"""The data that comes with the package: valid, small, disjoint where the stages must not see each other's prompts, and attributed."""

import re

import pytest

from instructlite.data.check import check_file
from instructlite.data.containers import STARTER
from instructlite.data.records import read_records, split_by_prompt

ROWS = {"demonstrations": 320, "comparisons": 828, "rankings": 29, "prose": 143}
KINDS = {"demonstrations": "demonstrations", "comparisons": "comparisons", "rankings": "rankings", "prose": "texts"}


def opening(record):
    first = next(turn["content"] for turn in record["prompt"] if turn["role"] == "user")
    return " ".join(first.lower().split())


@pytest.mark.parametrize("name", ROWS)
def test_each_file_is_clean(name):
    report = check_file(STARTER / f"{name}.jsonl")
    assert (report.kind, report.rows, report.problems) == (KINDS[name], ROWS[name], [])
    assert [note for note in report.notes if not note.startswith("extra keys kept")] == []


@pytest.mark.parametrize("kind", ["demonstrations", "comparisons", "rankings", "prompts", "texts"])
def test_starter_is_read_by_its_name(kind):
    assert len(read_records("starter", kind)) >= 29


def test_starter_needs_a_kind():
    with pytest.raises(Exception, match="say which"):
        read_records("starter")


def test_every_row_names_its_source_and_every_source_is_attributed():
    sources = (STARTER / "SOURCES.md").read_text(encoding="utf-8")
    named = {record["source"] for kind in KINDS.values() for record in read_records("starter", kind)}
    assert named == {
        "databricks-dolly-15k",
        "hh-rlhf/helpful-base",
        "oasst1/validation-en",
        "Wikipedia via databricks-dolly-15k",
        "Project Gutenberg: Alice's Adventures in Wonderland (Lewis Carroll, 1865)",
        "Project Gutenberg: Pride and Prejudice (Jane Austen, 1813)",
        "Project Gutenberg: The Adventures of Sherlock Holmes (Arthur Conan Doyle, 1892)",
    }
    assert all(f"`{source}`" in sources for source in named)
    for notice in (
        "MIT License",
        "Copyright (c) 2022 Anthropic",
        "creativecommons.org/licenses/by-sa/3.0",
        "apache.org/licenses/LICENSE-2.0",
    ):
        assert notice in sources


def test_demonstrations_share_no_prompt_with_comparisons_or_rankings():
    kinds = {kind: {opening(record) for record in read_records("starter", kind)} for kind in ("demonstrations", "comparisons", "rankings")}
    assert not kinds["demonstrations"] & (kinds["comparisons"] | kinds["rankings"])
    assert not kinds["comparisons"] & kinds["rankings"]


def test_both_kinds_of_demonstrations_are_mixed_throughout():
    sources = [record["source"] for record in read_records("starter", "demonstrations")]
    for start in range(0, 320, 80):
        assert 25 <= sources[start : start + 80].count("hh-rlhf/helpful-base") <= 55


def test_comparisons_suffice_for_reward_judge_and_held_out_pairs():
    parts = split_by_prompt(read_records("starter", "comparisons"), {"reward": 400, "judge": 280, "heldout": 136})
    assert [abs(len(part) - size) <= 5 for part, size in zip(parts.values(), (400, 280, 136), strict=True)] == [True] * 3


def test_no_contact_data_links_or_chat_markup_are_in_the_texts():
    marks = re.compile(r"\w@\w+\.|https?:|www\.|\b\d{3}[-. ]\d{3}[-. ]\d{4}\b|<\||\b(human|assistant):", re.IGNORECASE)
    for path in STARTER.glob("*.jsonl"):
        assert not [found.group() for found in marks.finditer(path.read_text(encoding="utf-8"))], path.name


def test_the_starter_data_stays_small():
    assert sum(path.stat().st_size for path in STARTER.iterdir()) < 1_500_000
