"""The shipped sets: what they hold, that they are small, and that nobody trains on them with the starter data."""

import json

import pytest

from instructlite.data.records import opening, read_records
from instructlite.errors import InstructLiteError
from instructlite.evaluation.prompt_sets import SHIPPED, multiple_choice, prompt_set, prose, shipped

FILES = sorted(SHIPPED.glob("*.jsonl"))


def test_the_sets_are_small_and_every_row_names_its_source():
    assert [path.stem for path in FILES] == ["closed_domain", "prose", "red_team", "truthfulqa"]
    assert sum(path.stat().st_size for path in FILES) < 150_000
    for path in FILES:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) <= 100 and all(row["source"] for row in rows), path
        assert f"| `{path.name}` | {len(rows)} |" in (SHIPPED / "SOURCES.md").read_text(encoding="utf-8")


def test_no_row_is_in_the_starter_data():
    starter = {opening(row) for kind in ("demonstrations", "comparisons", "rankings", "texts") for row in read_records("starter", kind)}
    own = [*shipped("red-team").rows, *shipped("closed-domain").rows, *({"text": text} for text in prose())]
    assert not starter & {opening(row) for row in own}


def test_red_team_has_harmless_prompts_and_closed_domain_has_passages_and_references():
    red, closed = shipped("red-team"), shipped("closed-domain")
    assert red.references is None and 10 <= red.categories.count("harmless") < len(red.rows) / 3
    assert len(closed.references) == len(closed.rows)
    assert all("\n\n" in prompt[-1]["content"] for prompt in closed.prompts)


def test_ones_own_prompts_keep_their_use_case_or_are_classified():
    found = prompt_set("mine", [{"prompt": "Write a poem.", "category": "general_qa"}, {"prompt": "Rephrase this: hi there"}])
    assert found.categories == ["open_qa", "rewrite"]
    assert found.prompts[0] == [{"role": "user", "content": "Write a poem."}]
    assert found.references is None


def test_multiple_choice_needs_a_true_and_a_false_answer(tmp_path):
    good = {"question": "1+1?", "best_answer": "2", "incorrect_answers": ["3"]}
    assert multiple_choice([good]) == [good]
    for bad in ({**good, "incorrect_answers": []}, {**good, "incorrect_answers": "3"}, {"question": "1+1?"}, "text"):
        with pytest.raises(InstructLiteError, match="row 2"):
            multiple_choice([good, bad])
    (tmp_path / "mine.jsonl").write_text("{oops\n")
    with pytest.raises(InstructLiteError, match="mine.jsonl"):
        multiple_choice(tmp_path / "mine.jsonl")
