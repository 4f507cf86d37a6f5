"""Votes become records that training reads, no vote disappears uncounted, and records become votes."""

import json
import random
from types import SimpleNamespace

import pytest

from instructlite import cli
from instructlite.data.records import as_groups, read_records, write_records
from instructlite.errors import BadRecords, InstructLiteError
from instructlite.feedback.ballots import FLAGS, Answer, Ballot, Candidate
from instructlite.feedback.exchange import GOLD, NAMES_ONE, NOT_BLIND, export, import_votes
from instructlite.feedback.store import Store

BASE = Candidate("base", "org/Secret-7B")
SFT = Candidate("sft", "org/Secret-7B", "a" * 64)
PPO = Candidate("ppo", "org/Secret-7B", "b" * 64)
DISAGREE = "voters disagree, and none of the answers has a majority"


@pytest.fixture
def votes(tmp_path):
    opened = Store(tmp_path, votes_per_minute=None, rng=random.Random(0))
    yield opened
    opened.close()


def said(votes: Store, texts, *ballots: Ballot, prompt: str = "Why?", gold=None, names=("sft", "ppo", "base"), voters=None, use_case=None):
    """An item with these answers, and the ballots of voters 0, 1, …, each in the order of `texts`."""
    known = {"sft": SFT, "ppo": PPO, "base": BASE}
    answers = [Answer(known[name], text) for name, text in zip(names, texts, strict=False)]
    with votes.writing():
        item = votes.add_item([{"role": "user", "content": prompt}], answers, gold=gold, use_case=use_case)
        for number, ballot in enumerate(ballots):
            voter = votes.voter(name=f"Voter Name {number}" if voters is None else voters[number], group="nurses")
            votes.record(item, voter.key, ballot)


def first(**rest) -> Ballot:
    return Ballot((0, 1), **rest)


def second(**rest) -> Ballot:
    return Ballot((1, 0), **rest)


def test_a_majority_is_one_comparison_with_a_soft_label(votes):
    said(votes, ["one", "two"], first(), first(), second(), Ballot.tie(), use_case="chat")
    [row] = export(votes.votes(), "comparisons").records
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([{"role": "user", "content": "Why?"}], "one", "two")
    assert (row["votes"], row["soft_label"]) == ({"chosen": 2, "rejected": 1, "tie": 1}, 2.5 / 4)
    assert (row["candidates"], row["category"], len(row["annotators"])) == ({"chosen": "sft", "rejected": "ppo"}, "chat", 4)


def test_the_other_side_may_win(votes):
    said(votes, ["one", "two"], second())
    [row] = export(votes.votes(), "comparisons").records
    assert (row["chosen"], row["rejected"], row["soft_label"], row["candidates"]) == (
        "two",
        "one",
        1.0,
        {"chosen": "ppo", "rejected": "sft"},
    )


@pytest.mark.parametrize(
    ("ballots", "reason"),
    [
        ([first(), second()], DISAGREE),
        ([first(), Ballot.tie()], DISAGREE),
        ([Ballot.tie()], "a tie"),
        ([Ballot.tie(), Ballot.tie(), first()], "a tie"),
        ([Ballot.both_bad()], "all bad"),
        ([Ballot.both_bad(), Ballot.tie()], "a tie"),
    ],
)
def test_pairs_without_a_majority_are_counted_and_left_out(votes, ballots, reason):
    said(votes, ["one", "two"], *ballots)
    result = export(votes.votes(), "comparisons")
    assert (result.records, dict(result.left_out)) == ([], {reason: len(ballots)})


def test_all_votes_keep_disagreement_as_opposite_pairs(votes):
    said(votes, ["one", "two"], first(), second(), first(), Ballot.tie())
    result = export(votes.votes(), "comparisons", counting="all")
    assert [row["chosen"] for row in result.records] == ["one", "two", "one"]
    assert len({row["annotator"] for row in result.records}) == 3
    assert dict(result.left_out) == {"a tie": 1}


def test_comparisons_and_ranking_of_a_set_hold_the_same_pairs(votes):
    said(votes, ["one", "two", "three"], Ballot((2, 0, 1)))
    said(votes, ["uno", "dos", "tres"], Ballot.better(1, 3))
    pairs = {(row["chosen"], row["rejected"]) for row in export(votes.votes(), "comparisons").records}
    assert pairs == {("two", "three"), ("two", "one"), ("three", "one"), ("dos", "uno"), ("dos", "tres")}
    rankings = as_groups(export(votes.votes(), "rankings").records)
    ordered = {
        (a, b)
        for group in rankings
        for a, rank_a in zip(group["responses"], group["ranks"], strict=True)
        for b, rank_b in zip(group["responses"], group["ranks"], strict=True)
        if rank_a < rank_b
    }
    assert ordered == pairs


def test_a_ranking_by_consensus_goes_by_mean_rank(votes):
    said(votes, ["one", "two", "three"], Ballot((0, 1, 2)), Ballot((0, 1, 1)), Ballot((1, 0, 2)))
    [row] = export(votes.votes(), "rankings").records
    assert row["ranks"] == pytest.approx([1 / 3, (1 + 1.5 + 0) / 3, (2 + 1.5 + 2) / 3])
    assert len(export(votes.votes(), "rankings", counting="all").records) == 3


def test_likert_scores_become_rankings_with_the_scores(votes):
    said(votes, ["one", "two", "three"], Ballot((0, 1, 2), likert=(7, 3, None)), Ballot((0, 0, 0), likert=(4, 4, 1)), Ballot.tie(3))
    [row] = export(votes.votes(), "likert").records
    assert (row["responses"], row["scores"], row["ranks"]) == (["one", "two", "three"], [5.5, 3.5, 1.0], [0, 1, 2])
    every = export(votes.votes(), "likert", counting="all")
    assert [(row["responses"], row["scores"]) for row in every.records] == [(["one", "two"], [7, 3]), (["one", "two", "three"], [4, 4, 1])]
    assert every.units == 2


def test_an_edited_answer_is_a_demonstration(votes):
    said(votes, ["one", "two"], first(edits=("one, but better", None)), second(edits=("one", " ")))
    result = export(votes.votes(), "demonstrations")
    [row] = result.records
    assert (row["prompt"][-1]["content"], row["completion"], row["edited_from"]) == ("Why?", "one, but better", "one")
    assert dict(result.left_out) == {"the answer was not changed": 1, "'completion' is empty": 1}


def test_rows_that_training_would_refuse_are_counted_by_what_is_wrong(votes):
    said(votes, ["same", "same "], first())
    said(votes, ["", "two"], second())
    result = export(votes.votes(), "comparisons")
    assert not result.records
    assert dict(result.left_out) == {"'chosen' and 'rejected' are the same text": 1, "'rejected' is empty": 1}


def test_control_characters_do_not_spoil_the_file(votes, tmp_path):
    said(votes, ["a\x00b", "\x07"], first())
    said(votes, ["a\x00b", "c"], first())
    result = export(votes.votes(), "comparisons")
    write_records(tmp_path / "c.jsonl", result.records)
    assert [row["chosen"] for row in read_records(tmp_path / "c.jsonl")] == ["ab"]
    assert dict(result.left_out) == {"'rejected' is empty": 1}


@pytest.mark.parametrize(
    ("text", "betrays"),
    [
        ("I am the ppo model.", True),
        ("As SFT, I can say", True),
        ("I'm Secret-7B, nice to meet you", True),
        ("I am ChatGPT, made to help.", True),
        ("I was trained by researchers at OpenAI.", True),
        ("My name is Claude.", True),
        ("Claude Monet painted it; look for him on Google.", False),
        ("The base of the mountain.", False),
        ("suppose, softly, doppots", False),
        ("It was made by hand. OpenAI is a company.", False),
        ("A secret is a secret.", False),
        ("I am yielding, and a metaphysician.", False),
        ("i'm chatgpt.", True),
    ],
)
def test_votes_on_answers_that_name_a_candidate_or_a_model_are_left_out_and_counted(votes, text, betrays):
    said(votes, [text, "two"], first())
    said(votes, ["fine", "too"], first(), prompt="What is it?")
    for to in ("comparisons", "rankings"):
        result = export(votes.votes(), to)
        assert (len(result.records), dict(result.left_out)) == ((1, {NOT_BLIND: 1}) if betrays else (2, {}))


def test_an_edit_that_names_a_model_is_no_demonstration(votes):
    said(votes, ["I am ppo.", "two"], first(edits=("I am GPT-4.", None)), first(edits=("I am here to help.", None)))
    result = export(votes.votes(), "demonstrations")
    assert ([row["completion"] for row in result.records], result.left_out) == (["I am here to help."], {NAMES_ONE: 1})
    assert export(votes.votes(), "comparisons").left_out == {NOT_BLIND: 2}


def test_a_name_that_the_prompt_asks_about_betrays_nothing(votes):
    said(votes, ["PPO is a method.", "PPO? Another."], first(), prompt="What is ppo?")
    assert len(export(votes.votes(), "comparisons").records) == 1


def test_items_that_measure_voters_are_no_training_data(votes):
    said(votes, ["one", "two"], first(), gold=[0, 1])
    result = export(votes.votes(), "rankings")
    assert (result.records, dict(result.left_out)) == ([], {GOLD: 1})


def test_an_export_names_nobody_unless_it_is_asked_to(votes):
    said(votes, ["one", "two"], first(comment="I live in Bonn", edits=("three", None)))
    for to in ("comparisons", "rankings", "demonstrations"):
        for counting in ("consensus", "all"):
            text = json.dumps(export(votes.votes(), to, counting=counting).records)
            assert not [word for word in ("Voter Name", "nurses", "Bonn", ":00", "+00") if word in text]
            [row] = export(votes.votes(), to, counting=counting, identified=True).records
            assert (row["annotator"], row["group"], row["comment"]) == ("Voter Name 0", "nurses", "I live in Bonn")
    with votes.reading() as db:
        key = db.execute("SELECT key FROM voters").fetchone()[0]
    assert key not in text


def random_votes(votes: Store, seed: int) -> None:
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "I am ppo", "", "delta"]
    for number in range(40):
        k = rng.choice([2, 2, 3])
        texts = [f"{rng.choice(words)} {rng.randrange(9)}" if rng.random() < 0.9 else "" for _ in range(k)]
        ballots = []
        for _ in range(rng.randrange(4)):
            ranks = rng.choice([tuple(rng.randrange(k) for _ in range(k)), (0,) + (None,) * (k - 1), (0,) * k])
            likert = tuple(rng.choice([None, 1, 4, 7]) for _ in range(k)) if rng.random() < 0.5 else None
            edits = tuple(rng.choice([None, "better", ""]) for _ in range(k)) if rng.random() < 0.3 else None
            ballots.append(Ballot(ranks, len(set(ranks)) == 1 and rng.random() < 0.5, likert, None, edits))
        said(votes, texts, *ballots, prompt=f"Question {number}?", gold=list(range(k)) if number % 10 == 0 else None)


@pytest.mark.parametrize("counting", ["consensus", "all"])
@pytest.mark.parametrize(
    ("to", "kind"),
    [("comparisons", "comparisons"), ("rankings", "rankings"), ("demonstrations", "demonstrations"), ("likert", "rankings")],
)
def test_exports_round_trip_through_the_reader_and_account_for_every_vote(votes, tmp_path, to, kind, counting):
    with votes.writing():
        random_votes(votes, seed=1)
    rows = votes.votes()
    result = export(rows, to, counting=counting)
    assert result.records
    assert result.used + sum(result.left_out.values()) == result.units
    assert (result.votes, result.voters) == (len(rows), 3)
    write_records(tmp_path / "out.jsonl", result.records)
    assert read_records(tmp_path / "out.jsonl", kind) == result.records
    assert export(votes.votes(), to, counting=counting).records == result.records
    for line in str(result).splitlines():
        assert "\x1b" not in line


@pytest.mark.parametrize("to", ["comparisons", "rankings"])
def test_what_was_exported_can_be_imported_and_exported_again(votes, tmp_path, to):
    said(votes, ["one", "two", "three"], Ballot((2, 0, 1)), Ballot((0, 1, 2)), use_case="chat")
    said(votes, ["uno", "dos"], first(), second(), prompt="And now?")
    rows = export(votes.votes(), to, counting="all").records
    write_records(tmp_path / "out.jsonl", rows)
    other = Store(tmp_path / "other.sqlite", votes_per_minute=1)
    assert str(import_votes(other, tmp_path / "out.jsonl")) == f"{len(rows)} votes imported"
    assert str(import_votes(other, tmp_path / "out.jsonl")) == f"0 votes imported; {len(rows)} there already"

    def content(record):
        pair = [record["chosen"], record["rejected"]] if "chosen" in record else [record["responses"], record["ranks"]]
        return [record["prompt"], *pair, record["candidates"], record.get("category"), record["created"]]

    # Voters get new pseudonyms, made from the keys of that file.
    assert list(map(content, export(other.votes(), to, counting="all").records)) == list(map(content, rows))
    assert {vote.name for vote in other.votes()} == {row["annotator"] for row in rows}


def test_a_file_with_a_fault_or_without_votes_imports_nothing(votes, tmp_path):
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "bad.jsonl").write_text(good + '{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(BadRecords, match=r"bad\.jsonl:2: "):
        import_votes(votes, tmp_path / "bad.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InstructLiteError, match="holds no votes"):
        import_votes(votes, tmp_path / "prompts.jsonl")
    # A fault that only shows while it is saved undoes what came before it.
    rankings = [{"prompt": "b", "responses": [str(i) for i in range(k)], "ranks": list(range(k))} for k in (3, 12)]
    write_records(tmp_path / "late.jsonl", rankings)
    with pytest.raises(InstructLiteError, match="12 answers to compare"):
        import_votes(votes, tmp_path / "late.jsonl")
    assert not votes.votes()


def test_votes_from_elsewhere_have_a_voter_each_and_the_first_one_counts(votes, tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "annotator": "ann", "created": "2026-01-02T03:04:05"},
        {"prompt": "a", "chosen": "c", "rejected": "b", "annotator": "bob", "created": "yesterday"},
        {"prompt": "a", "chosen": "c", "rejected": "b", "annotator": "ann"},
        {"prompt": "d", "chosen": "e", "rejected": "f"},
    ]
    write_records(tmp_path / "file.jsonl", rows)
    result = import_votes(votes, tmp_path / "file.jsonl")
    assert (result.new, result.known, result.conflicting) == (3, 0, 1)
    found = votes.votes()
    assert [vote.name for vote in found] == ["ann", "bob", "file.jsonl"]
    assert found[0].created == "2026-01-02T03:04:05"
    assert [answer.candidate.name for answer in found[0].answers] == ["imported"] * 2


def test_equal_answers_of_a_ranking_are_imported_once(votes, tmp_path):
    write_records(tmp_path / "r.jsonl", [{"prompt": "a", "responses": ["x", "y", "x"], "ranks": [0.5, 2, 0.5]}])
    import_votes(votes, tmp_path / "r.jsonl")
    [vote] = votes.votes()
    assert [(answer.text, answer.rank) for answer in vote.answers] == [("x", 0), ("y", 1)]


# --- the command line -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_cli(capsys):
    def run(*arguments) -> SimpleNamespace:
        with pytest.raises(SystemExit) as end:
            cli.main(["votes", *map(str, arguments)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=captured.out, err=captured.err)

    return run


def test_votes_export_writes_beside_the_votes_and_says_what_is_left_out(votes, run_cli, tmp_path):
    said(votes, ["one", "two"], first(), first())
    said(votes, ["uno", "dos"], Ballot.tie(), prompt="And now?")
    result = run_cli("export", tmp_path, "--to", "comparisons")
    target = tmp_path / "votes_comparisons.jsonl"
    assert (result.code, result.err) == (0, "")
    assert result.out == f"1 comparisons from 3 judged pairs in 3 votes of 2 voters\nleft out: 1: a tie\nWritten: {target}\n"
    assert read_records(target, "comparisons")[0]["chosen"] == "one"
    assert not list(tmp_path.glob("*.tmp"))
    output = tmp_path / "all.jsonl"
    assert run_cli("export", votes.path, "--to", "comparisons", "--votes", "all", "--identified", "--output", output).code == 0
    assert [row["annotator"] for row in read_records(output)] == ["Voter Name 0", "Voter Name 1"]


def test_mistakes_with_votes_are_one_line_and_exit_code_2(votes, run_cli, tmp_path):
    for arguments, message in [
        (("export", tmp_path, "--to", "pairs"), "--to pairs: choose comparisons, rankings, demonstrations, likert"),
        (("export", tmp_path, "--to", "likert", "--votes", "some"), "--votes some: choose consensus or all"),
        (("export", tmp_path, "--to", "comparisons"), "no comparisons in these votes; nothing was written"),
        (("export", tmp_path / "nowhere", "--to", "rankings"), "no votes there"),
        (("report", tmp_path / "nowhere"), "no votes there"),
    ]:
        result = run_cli(*arguments)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert message in result.err
    assert {path.suffix for path in tmp_path.iterdir()} <= {".sqlite", ".lock", ".sqlite-wal", ".sqlite-shm"}


def test_votes_import_makes_the_file_and_report_shows_it(run_cli, tmp_path):
    write_records(tmp_path / "in.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "annotator": "ann"}])
    assert run_cli("import", tmp_path / "in.jsonl", tmp_path).out == f"1 votes imported into {tmp_path / 'votes.sqlite'}\n"
    assert "1 votes of 1 voters, 1 of them counted" in run_cli("report", tmp_path).out
    assert json.loads(run_cli("report", tmp_path, "--json").out)["counted"] == 1


def test_flags_go_with_rankings(votes):
    said(votes, ["one", "two"], first(flags=(["sexual"], [])), second(flags=(list(FLAGS)[:1], None)))
    rows = export(votes.votes(), "rankings", counting="all").records
    assert [row["flags"] for row in rows] == [[["sexual"], []], [["fails_instruction"], []]]
