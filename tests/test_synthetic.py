"""Data that a model writes: what is kept, what is left out with its reason, and that a second run asks nothing again."""

import json
import re
import sys

import pytest
from endpoints import FakeCompleter

from instructlite.data.generating.completer import Answer, Budget
from instructlite.data.generating.pairwise import Pair, Verdicts, sign_test, verdict_in
from instructlite.data.generating.self_instruct import Pool
from instructlite.data.generating.synthetic import generate
from instructlite.data.generating.templates import FOLDER, read_prompts
from instructlite.data.records import read_records, write_records
from instructlite.errors import InstructLiteError

SEEDS = [{"prompt": f"Explain {word} to a child of ten years.", "completion": "Well."} for word in ("rain", "money", "sleep", "war")]


@pytest.fixture
def run(tmp_path):
    def run(method, rows, answer, **options):
        write_records(tmp_path / "in.jsonl", rows)
        completer = answer if isinstance(answer, FakeCompleter) else FakeCompleter(answer)
        return generate(method, tmp_path / "in.jsonl", completer, tmp_path / "out", **options)

    return run


def reasons(result) -> dict:
    return result.report()["rejected"]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# --- self-instruct -----------------------------------------------------------------------------------------------------------

VERBS = ("Describe", "List", "Compare", "Summarise", "Translate", "Criticise", "Invent", "Rewrite")


def new_tasks(prompt: str) -> str:
    """A numbered list of tasks that differ from one request to the next, a bad one among them; else an answer."""
    found = re.search(r"numbered (\d+) to (\d+)", prompt)
    if not found:
        return f"An answer to: {prompt}"
    number = sum(map(ord, prompt))
    tasks = [f"{VERBS[(number + i) % 8]} {number * 7 + i} quick w{number}x{i} and z{i}y{number}" for i in range(3)]
    listed = [*tasks, "Explain rain to a child of nine years.", "Draw a picture of a nice house", "Go", tasks[0]]
    return "Sure:\n" + "\n".join(f"{int(found[1]) + i}. {task}" for i, task in enumerate(listed))


def test_new_tasks_are_kept_if_they_are_novel_and_answered(run, tmp_path):
    result = run("self-instruct", SEEDS, new_tasks, count=10)
    assert len(result.rows) == 10
    found = read_records(tmp_path / "out" / "demonstrations.jsonl", "demonstrations")
    tasks = [row["prompt"][0]["content"] for row in found]
    assert len(set(tasks)) == 10
    assert all(row["completion"] == f"An answer to: {task}" for row, task in zip(found, tasks, strict=True))
    left = reasons(result)
    assert set(left) == {"task too near to another", "task needs more than text", "task too short or too long"}
    assert left["task too near to another"] >= 2 * left["task needs more than text"] - 1  # the seed's neighbour, and the repetition


def test_every_row_says_where_it_comes_from(run):
    origin = run("self-instruct", SEEDS, new_tasks, count=3, seed=5).rows[0]["provenance"]
    assert origin["method"] == "self-instruct"
    assert origin["model"] == "fake"
    assert origin["prompt_sha256"] == read_prompts("self_instruct").sha256
    assert origin["seed"] == 5
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", origin["created"])


def test_a_model_without_ideas_ends_the_search(run):
    result = run("self-instruct", SEEDS, lambda prompt: "1. Explain rain to a child of ten years.", count=5)
    assert (result.rows, result.measured["rounds"]) == ([], 5)
    assert "only 0 of 5 tasks" in result.notes[0]


def test_tasks_alone_are_prompts(run, tmp_path):
    run("self-instruct", SEEDS, new_tasks, count=4, answers=False)
    assert len(read_records(tmp_path / "out" / "prompts.jsonl", "prompts")) == 4


def test_novelty_is_rouge_l_in_any_language():
    pool = Pool(["Explain the rain to a child", "объясни дождь ребёнку просто", "雨はどうして降るのか"], 0.7)
    assert pool.too_near("Explain the rain to a small child")
    assert not pool.too_near("child a to rain the Explain")  # the same words: no common order
    assert pool.too_near("Объясни дождь ребёнку")
    assert pool.too_near("雨はどうして降るの")
    assert not pool.too_near("Name three rivers")


def test_the_last_task_of_a_list_that_was_cut_off_is_not_taken(run):
    listed = "9. Name all the rivers of Europe\n10. Write a long poem about the"
    result = run("self-instruct", SEEDS, lambda prompt: Answer(listed, truncated=True), count=2, answers=False)
    assert [row["prompt"][0]["content"] for row in result.rows] == ["Name all the rivers of Europe"]


def test_a_missing_rouge_package_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InstructLiteError, match=r"pip install 'instructlite\[data\]'"):
        run("self-instruct", SEEDS, new_tasks)


# --- Evol-Instruct -----------------------------------------------------------------------------------------------------------


def evolving(prompt: str) -> str:
    instruction = re.search(r"Instruction: (.*)", prompt)
    if instruction:
        text = instruction[1]
        if "money" in text:
            return "#Rewritten Prompt#: of the given prompt"
        return f"Instruction: {text} harder"
    if "Equal or Different" in prompt:
        return "Equal." if "sleep" in prompt else "Different."
    return "Sorry, as an AI I cannot." if "war" in prompt else "A long answer."


def test_instructions_evolve_and_failed_evolutions_are_eliminated(run, tmp_path):
    result = run("evol-instruct", SEEDS, evolving, rounds=2)
    rain = "Explain rain to a child of ten years."
    assert [row["prompt"] for row in result.rows] == [user(f"{rain} harder"), user(f"{rain} harder harder")]
    assert [row["provenance"]["parent"] for row in result.rows] == [rain, f"{rain} harder"]
    assert [row["provenance"]["round"] for row in result.rows] == [1, 2]
    # Those that failed stay as they were, and fail again; a second evolution like the first is known already.
    left = reasons(result)
    assert left["evolution speaks of its prompt"] == 2
    assert left["evolution gained nothing"] + left["answer is an apology"] + left.get("evolution is a known instruction", 0) == 4
    assert read_records(tmp_path / "out" / "demonstrations.jsonl", "demonstrations") == result.rows


def test_the_four_operations_are_all_used(run):
    rows = [{"prompt": f"Task number {i} of many"} for i in range(40)]
    result = run("evol-instruct", rows, lambda prompt: "Different" if "Equal or" in prompt else f"{hash(prompt)}", rounds=1)
    assert {row["provenance"]["operation"] for row in result.rows} == {"deepen", "constrain", "concretise", "breadth"}


def test_an_unreadable_verdict_on_the_gain_is_no_gain(run):
    result = run("evol-instruct", SEEDS[:1], lambda prompt: "Hm" if "Equal or" in prompt else "Something else", rounds=1)
    assert reasons(result) == {"no verdict on what was gained": 1}


# --- constitutional ----------------------------------------------------------------------------------------------------------


def revising(prompt: str) -> str:
    if "What a critic said" in prompt:
        return "cold" if "stubborn" in prompt else "a better answer"
    if "NONE" in prompt:
        return "NONE." if "saint" in prompt else "It is rude."
    return "cold" if "stubborn" in prompt else "a first answer"


def test_the_revised_answer_is_chosen_and_the_first_rejected(run, tmp_path):
    rows = [{"prompt": "greet me"}, {"prompt": "be a saint"}, {"prompt": "be stubborn"}]
    result = run("constitutional", rows, revising)
    (row,) = read_records(tmp_path / "out" / "comparisons.jsonl", "comparisons")
    assert (row["prompt"], row["chosen"], row["rejected"]) == (user("greet me"), "a better answer", "a first answer")
    (revision,) = row["provenance"]["revisions"]
    assert revision["critique"] == "It is rude."
    assert revision["principle"] in {principle["name"] for principle in read_prompts("constitutional").others["principles"]}
    assert reasons(result) == {"nothing to criticise": 1, "revision changed nothing": 1}


def test_revisions_follow_one_another(run):
    fake = FakeCompleter(lambda prompt: revising(prompt) if "a better answer" not in prompt or "NONE" in prompt else "the best answer")
    (row,) = run("constitutional", [{"prompt": "greet me"}], fake, revisions=2).rows
    assert (row["chosen"], row["rejected"]) == ("the best answer", "a first answer")
    assert len(row["provenance"]["revisions"]) == 2


def test_principles_are_the_users_to_change(run, tmp_path):
    own = tmp_path / "own.yaml"
    shipped = (FOLDER / "constitutional.yaml").read_text()
    own.write_text(re.sub(r"principles:\n(  .*\n)+", "principles:\n  - {name: brief, critique: 'LONG?', revision: SHORTER.}\n", shipped))
    fake = FakeCompleter(revising)
    result = run("constitutional", [{"prompt": "greet me"}], fake, prompts=own)
    assert result.rows[0]["provenance"]["revisions"][0]["principle"] == "brief"
    hashes = [read_prompts("constitutional", file).sha256 for file in (own, None)]
    assert result.rows[0]["provenance"]["prompt_sha256"] == hashes[0] != hashes[1]
    assert any("LONG?" in prompt for prompt in fake.asked)
    own.write_text(shipped.replace("principles:", "rules:"))
    with pytest.raises(InstructLiteError, match="own.yaml: 'principles' is missing"):
        run("constitutional", [{"prompt": "greet me"}], revising, prompts=own)


# --- AI preferences ----------------------------------------------------------------------------------------------------------

PEOPLE = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


def places(prompt: str) -> tuple[str, str]:
    return re.search(r"\[Answer A\]\n(.*)\n", prompt)[1], re.search(r"\[Answer B\]\n(.*)\n", prompt)[1]


def fair(prompt: str) -> str:
    a, b = places(prompt)
    return f"I find it so. [[{'A' if a.startswith('good') else 'B' if b.startswith('good') else 'C'}]]"


def test_preferences_of_a_fair_judge(run, tmp_path):
    fake = FakeCompleter(fair)
    result = run("ai-preferences", PEOPLE, fake)
    found = read_records(tmp_path / "out" / "comparisons.jsonl", "comparisons")
    assert [(row["chosen"], row["rejected"]) for row in found] == [(f"good {i}", f"bad {i}") for i in range(20)]
    assert len(fake.asked) == 40  # both orders
    measured = result.measured
    assert (measured["agrees_with_people"], measured["position_bias"], measured["consistent"], measured["ties"]) == (1.0, 0.0, 1.0, 0)
    assert not result.notes


def test_a_judge_that_always_takes_the_first_place_makes_ties_and_is_reported(run, tmp_path):
    result = run("ai-preferences", PEOPLE, lambda prompt: "[[A]]")
    assert not result.rows
    assert not (tmp_path / "out" / "comparisons.jsonl").exists()
    ties = [json.loads(line) for line in (tmp_path / "out" / "ties.jsonl").read_text().splitlines()]
    assert [row["ranks"] for row in ties] == [[0, 0]] * 20
    assert (result.measured["position_bias"], result.measured["agrees_with_people"]) == (1.0, 0.5)
    assert "position bias: in 20 of 20 pairs the judge took whichever answer stood first" in result.notes[0]


def test_answers_are_written_to_prompts_that_have_none(run):
    draws = iter(range(100))
    answer = lambda prompt: fair(prompt) if "[Answer A]" in prompt else "good" if next(draws) % 2 else "bad"  # noqa: E731
    result = run("ai-preferences", [{"prompt": "question"}], answer)
    assert [(row["chosen"], row["rejected"]) for row in result.rows] == [("good", "bad")]


def test_more_than_two_answers_are_ranked(run, tmp_path):
    row = {"prompt": "question", "responses": ["bad 1", "good 1", "bad 2", "good 2"], "ranks": [1, 0, 1, 0]}
    result = run("ai-preferences", [row], fair)
    (found,) = read_records(tmp_path / "out" / "rankings.jsonl", "rankings")
    assert found["ranks"] == [0, 0, 0, 0] or found["ranks"] == [1, 0, 1, 0]
    assert result.measured["pairs"] == 6


def test_a_missing_verdict_is_no_verdict(run):
    result = run("ai-preferences", PEOPLE, lambda prompt: "[[A]] or [[B]]" if "question 3\n" in prompt else fair(prompt))
    assert reasons(result) == {"no verdict": 1}
    assert (len(result.rows), result.measured["missing"]) == (19, 1)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Good. [[A]]", "A"), ("[[ b ]]", "B"), ("[[A]] ... so [[A]]", "A"), ("[[A]] [[B]]", None), ("A", "A"), ("Verdict: B.", "B"),
        ("**Answer: C**", "C"), ("A is better", None), ("", None), (None, None), ("[[7]]", "7"), ("Rating: 10", "10"), ("[[tie]]", "TIE"),
    ],
)  # fmt: skip
def test_verdicts_are_read_and_never_guessed(text, verdict):
    assert verdict_in(text) == verdict


def test_the_sign_test_is_the_binomial_one():
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    assert sign_test(480, 520) == pytest.approx(sign_test(481, 520), abs=0.03)
    assert sign_test(481, 521) == pytest.approx(0.2176, abs=1e-3)


def test_outcomes_need_both_orders():
    verdicts = Verdicts([1, 1, 0, 0.5, None, 0.5], [0, 1, 1, 0, 1, 0.5], [False] * 5 + [True], [""] * 6)
    assert verdicts.outcomes == [1.0, 0.5, 0.0, 0.5, None, 0.5]
    measured = verdicts.measured()
    assert (measured["judged"], measured["same_text"], measured["always_first"], measured["ties"]) == (4, 1, 1, 2)
    assert Pair(user("q"), "a", "b").reference is None


# --- rejection sampling ------------------------------------------------------------------------------------------------------


def test_the_answer_with_the_highest_score_is_kept(run, tmp_path):
    draws = iter(["short", "the longest of all", "rather long", Answer("cut off, longer than all others", truncated=True)])
    result = run(
        "rejection-sampling", [{"prompt": "q"}], lambda prompt: next(draws), n=4, score=lambda pairs: [len(answer) for _, answer in pairs]
    )
    (row,) = read_records(tmp_path / "out" / "demonstrations.jsonl", "demonstrations")
    assert row["completion"] == "the longest of all"
    assert (row["provenance"]["score"], row["provenance"]["n"]) == (18, 3)
    assert reasons(result) == {"answer cut off at max_tokens": 1}


def test_a_best_score_that_is_too_low_is_left_out(run):
    result = run("rejection-sampling", [{"prompt": "q"}], lambda prompt: "x", n=2, score=lambda pairs: [0.0] * len(pairs), min_score=0.5)
    assert (result.rows, reasons(result)) == ([], {"best score too low": 1})


# --- all of them -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rows", "answer", "options"),
    [
        ("self-instruct", SEEDS, new_tasks, {"count": 6}),
        ("evol-instruct", SEEDS, evolving, {}),
        ("constitutional", [{"prompt": "greet me"}], revising, {}),
        ("ai-preferences", PEOPLE[:3], fair, {}),
        ("rejection-sampling", [{"prompt": "q"}], lambda prompt: "x", {"score": lambda pairs: [0.0] * len(pairs)}),
    ],
)
def test_stopped_anywhere_the_next_run_ends_with_the_same_rows_and_asks_nothing_twice(run, tmp_path, method, rows, answer, options):
    fake = FakeCompleter(answer)
    for allowed in range(1, 100, 2):
        result = run(method, rows, fake, budget=Budget(max_requests=allowed), **options)
        if not result.usage.unasked:
            break
        assert "the budget is spent" in result.notes[-1]
    text = (tmp_path / "out" / f"{result.kind}.jsonl").read_text()
    asked = len(fake.asked)
    run(method, rows, fake, **options)
    assert len(fake.asked) == asked
    assert (tmp_path / "out" / f"{result.kind}.jsonl").read_text() == text
    write_records(tmp_path / "in.jsonl", rows)
    once = FakeCompleter(answer)
    generate(method, tmp_path / "in.jsonl", once, tmp_path / "at once", **options)
    assert len(once.asked) == asked
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"] == len(result.rows)


def test_what_never_comes_is_counted_and_never_made_up(run):
    result = run("constitutional", [{"prompt": str(i)} for i in range(5)], lambda prompt: Answer(None, "HTTP 500"))
    assert (result.rows, reasons(result)) == ([], {"no answer (HTTP 500)": 5})
    assert result.usage.missing == 5


def test_mistakes_are_one_line(run, tmp_path):
    for method, rows, options, said in (
        ("evolve", SEEDS, {}, "'evolve' is no method: choose self-instruct"),
        ("self-instruct", SEEDS, {"cuont": 3}, "'cuont' is no option of self-instruct: count, per_request"),
        ("self-instruct", SEEDS, {"count": "many"}, "count='many': self-instruct expects a value such as 100"),
        ("self-instruct", SEEDS, {"count": 0}, "count=0: must be at least 1"),
        ("self-instruct", [{"text": "prose"}], {}, "needs rows with a prompt"),
        ("rejection-sampling", SEEDS, {}, "needs a reward adapter"),
        ("rejection-sampling", SEEDS, {"prompts": "x.yaml"}, "has no prompts of its own"),
        ("evol-instruct", SEEDS, {"prompts": tmp_path / "none.yaml"}, "none.yaml: cannot be read"),
    ):
        with pytest.raises(InstructLiteError, match=re.escape(said)):
            run(method, rows, new_tasks, **options)


def test_a_file_of_prompts_has_the_templates_and_no_unknown_placeholder(tmp_path):
    own = tmp_path / "own.yaml"
    for text, said in (
        ("propose: 1", "'propose' is missing"),
        ("propose: $exampels", "asks for $exampels; known: $examples, $number, $first, $last"),
        ("propose: costs 5$", "a dollar sign of its own is written $$"),
        ("- propose", "expected named prompts"),
        ("a: b: c", "not YAML"),
    ):
        own.write_text(text)
        with pytest.raises(InstructLiteError, match=re.escape(said)):
            read_prompts("self_instruct", own)


def test_a_text_that_is_filled_in_is_not_read_as_a_template():
    message = read_prompts("evol_instruct").message("deepen", instruction="What is $instruction worth in $$?")
    assert "What is $instruction worth in $$?" in message[0]["content"]
