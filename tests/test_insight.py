"""Planted votes give the numbers worked out by hand, and nothing counts that should not."""

import json
import random

import pytest

from instructlite.feedback.ballots import Answer, Ballot, Candidate
from instructlite.feedback.exchange import GOLD, NOT_BLIND
from instructlite.feedback.insight import insight
from instructlite.feedback.store import Store

SFT, PPO = Candidate("sft", "org/Secret-7B", "a" * 64), Candidate("ppo", "org/Secret-7B", "b" * 64)


@pytest.fixture
def votes(tmp_path):
    opened = Store(tmp_path, votes_per_minute=None, rng=random.Random(0))
    yield opened
    opened.close()


def cast(votes: Store, number: int, winners: str, *, texts=("short", "a longer one"), scores=None, candidates=(SFT, PPO), **about) -> None:
    """One item of SFT and PPO; winners: a letter for each voter, s, p, t (tie) or b (both bad)."""
    ballots = {"s": Ballot((0, 1)), "p": Ballot((1, 0)), "t": Ballot.tie(), "b": Ballot.both_bad()}
    with votes.writing():
        answers = [Answer(candidate, text) for candidate, text in zip(candidates, texts, strict=True)]
        item = votes.add_item([{"role": "user", "content": f"Question {number}?"}], answers, **about)
        if scores:
            votes.add_scores("rm", dict(zip(item.answers, scores, strict=True)))
        for who, winner in enumerate(winners):
            voter = votes.voter(name=f"v{who}", group="odd" if who % 2 else "even")
            votes.record(item, voter.key, ballots[winner])


def test_win_rates_count_each_prompt_once_and_ties_half(votes):
    cast(votes, 0, "ppps")  # 0.75 for PPO, however many vote
    cast(votes, 1, "t")
    cast(votes, 2, "s")
    cast(votes, 3, "p")
    [row] = insight(votes.votes()).win_rates
    assert {key: row[key] for key in ("a", "b", "wins", "ties", "losses", "prompts")} == {
        "a": "ppo", "b": "sft", "wins": 4, "ties": 1, "losses": 2, "prompts": 4,
    }  # fmt: skip
    assert row["rate"] == pytest.approx((0.75 + 0.5 + 0 + 1) / 4)
    assert row["low"] < row["rate"] < row["high"]


def test_a_pair_is_the_same_pair_whichever_answer_was_written_first(votes):
    cast(votes, 0, "p")
    cast(votes, 1, "s", candidates=(PPO, SFT))  # here "s" prefers the first, PPO
    assert [(row["a"], row["wins"], row["losses"]) for row in insight(votes.votes()).win_rates] == [("ppo", 2, 0)]


def test_adapters_of_two_rounds_with_one_name_are_two(votes):
    cast(votes, 0, "p")
    cast(votes, 1, "p", candidates=(SFT, Candidate("ppo", "org/Secret-7B", "c" * 64)))
    assert {row["a"] for row in insight(votes.votes()).win_rates} == {"ppo@bbbbbbbb", "ppo@cccccccc"}


def test_use_cases_and_groups_have_rates_of_their_own(votes):
    cast(votes, 0, "ps", use_case="chat")
    cast(votes, 1, "ps", use_case="rewrite")
    cast(votes, 2, "ss", use_case="rewrite")
    found = insight(votes.votes())
    assert [(row["use_case"], row["rate"], row["prompts"]) for row in found.by_use_case] == [("chat", 0.5, 1), ("rewrite", 0.25, 2)]
    assert [(row["group"], pytest.approx(row["rate"])) for row in found.by_group] == [("even", 2 / 3), ("odd", 0)]


def test_gold_items_and_votes_that_were_not_blind_are_told_and_not_counted(votes):
    cast(votes, 0, "p")
    cast(votes, 1, "pps", gold=[1, 0])
    cast(votes, 2, "pp", texts=("I am sft", "x"))
    found = insight(votes.votes())
    assert (found.votes, found.counted, found.left_out) == (6, 1, {GOLD: 3, NOT_BLIND: 2})
    assert (found.gold["right"], found.gold["votes"]) == (2, 3)
    assert [(row["gold_right"], row["gold"]) for row in sorted(found.voters, key=lambda row: -row["votes"])] == [(1, 1), (1, 1), (0, 1)]
    assert found.win_rates[0]["wins"] == 1


def test_agreement_is_that_of_several_voters_on_one_pair(votes):
    for number, winners in enumerate(("pp", "ss", "ps", "tt", "p", "b")):
        cast(votes, number, winners)
    found = insight(votes.votes())
    assert (found.agreement["pairs"], found.agreement["same"]) == (4, 0.75)
    assert 0 < found.agreement["alpha"] < 1
    assert found.agreement["likert_alpha"] is None
    by_votes = {row["votes"]: row for row in found.voters}
    assert (by_votes[6]["shared"], by_votes[6]["agreement"], by_votes[4]["agreement"]) == (4, 0.75, 0.75)
    assert by_votes[6]["ties"] == pytest.approx(2 / 6)


def test_full_agreement_is_1_and_coins_are_near_0(votes):
    rng = random.Random(1)
    with votes.writing():
        for number in range(20):
            cast(votes, number, rng.choice("ps") * 3)
    assert insight(votes.votes()).agreement["alpha"] == pytest.approx(1)
    with votes.writing():
        for number in range(20, 100):
            cast(votes, number, "".join(rng.choice("ps") for _ in range(3)))
    found = insight([vote for vote in votes.votes() if vote.item > 20]).agreement
    assert found["low"] < 0 < found["high"] < 0.3


def test_a_reward_model_is_measured_by_where_people_saw_a_difference(votes):
    cast(votes, 0, "p", scores=(0.0, 2.0))
    cast(votes, 1, "s", scores=(0.0, 2.0))
    cast(votes, 2, "p", scores=(1.0, 1.0))
    cast(votes, 3, "t", scores=(0.0, 2.0))
    cast(votes, 4, "s", scores=(0.3, 0.0))
    cast(votes, 5, "p")
    cast(votes, 6, "p")
    votes.add_scores("rm", {votes.votes()[-1].answers[1].id: 9.0})  # the other answer has no score
    [row] = insight(votes.votes()).reward_models
    assert (row["judge"], row["pairs"], row["prompts"]) == ("rm", 4, 4)
    assert row["rate"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert row["longer_wins"] == 0.5
    assert [(round(bin["predicted"], 2), bin["observed"], bin["pairs"]) for bin in row["calibration"]] == [(0.54, 0.75, 2), (0.88, 0.5, 2)]


def test_who_always_takes_the_first_answer_is_seen(votes):
    lazy, fair = votes.voter().key, votes.voter().key
    with votes.writing():
        for number in range(20):
            item = votes.add_item([{"role": "user", "content": f"Question {number}?"}], [Answer(SFT, "one"), Answer(PPO, "two")])
            votes.vote(votes.show(item.id, lazy).ticket, lazy, Ballot.better(0))
            showing = votes.show(item.id, fair)
            votes.vote(showing.ticket, fair, Ballot.better(showing.answers.index("two")))
    found = insight(votes.votes())
    assert sorted(row["first_shown"] for row in found.voters)[1] == 1.0
    assert found.first_shown["rate"] > 0.5
    assert all(row["seconds"] >= 0 for row in found.voters)


def test_likert_means_and_flags_are_those_of_each_candidate(votes):
    for number, (likert, flags) in enumerate([((2, 6), (["hallucination"], [])), ((4, 6), ([], [])), ((3, None), (None, ["sexual"]))]):
        item = votes.add_item([{"role": "user", "content": f"Question {number}?"}], [Answer(SFT, "one"), Answer(PPO, "two")])
        votes.record(item, votes.voter(name="ann").key, Ballot.tie(likert=likert, flags=flags))
    by_name = {row["candidate"]: row for row in insight(votes.votes()).candidates}
    assert (by_name["sft"]["likert"], by_name["ppo"]["likert"]) == (3.0, 6.0)
    assert (by_name["sft"]["flags"]["hallucination"], by_name["ppo"]["flags"]["sexual"]) == (0.5, pytest.approx(1 / 3))


def test_the_best_of_three_compares_the_others_not_at_all(votes):
    three = [Answer(candidate, candidate.name * 2) for candidate in (Candidate("dpo"), SFT, PPO)]
    item = votes.add_item([{"role": "user", "content": "Why?"}], three)
    votes.record(item, votes.voter().key, Ballot.better(2, 3))
    assert {(row["a"], row["b"], row["wins"], row["ties"]) for row in insight(votes.votes()).win_rates} == {
        ("ppo", "dpo", 1, 0), ("ppo", "sft", 1, 0),
    }  # fmt: skip


def test_no_votes_are_no_numbers_and_no_error(votes):
    found = insight(votes.votes())
    assert str(found) == "0 votes of 0 voters, 0 of them counted"
    assert (found.win_rates, found.gold, found.first_shown, found.reward_models) == ([], None, None, [])


def test_it_is_plain_data_and_can_be_read_in_the_terminal(votes):
    for number in range(6):
        cast(votes, number, "pps", use_case="chat", scores=(0.0, 1.0), gold=[1, 0] if number == 5 else None)
    found = insight(votes.votes())
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    text = str(found)
    assert "18 votes of 3 voters, 15 of them counted" in text
    assert "ppo  sft        0.67 [0.67, 0.67]  10   0     5     5" in text
    assert "gold items: 2 of 3 votes right, 0.67" in text
    assert "reward model  orders pairs as people do  pairs" in text
    assert "v0" not in text  # voters are pseudonyms here too
