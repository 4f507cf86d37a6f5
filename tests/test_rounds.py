"""Rounds on the tiny model: votes teach reward model and policy, and whatever is interrupted anywhere goes on where it was."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from instructlite import rounds
from instructlite.cli import app
from instructlite.config import load_loop
from instructlite.data.records import opening, read_records, write_records
from instructlite.errors import BadRecords, InstructLiteError
from instructlite.feedback import drawing, voting
from instructlite.feedback.ballots import Ballot
from instructlite.feedback.store import Store
from instructlite.models.completer import load_scorer
from instructlite.models.manifest import Adapter
from instructlite.pipeline import in_this_process, run_loop
from instructlite.rounds import Judge, run_round
from instructlite.training.reward import right_pairs

WORDS = ("yes", "no", "maybe", "so", "well", "oh", "ah", "eh", "hm", "ha", "ho", "hi")
RECIPE = """
model: {model}
dtype: float32
chat_template: chatml
lora: {{r: 4, alpha: 8}}
data: {{demonstrations: {here}/d.jsonl, comparisons: {here}/c.jsonl, heldout_demonstrations: 2, judge: 3, heldout: 3}}
sft: {{training: {{per_device_train_batch_size: 4, max_steps: 2}}}}
reward: {{training: {{per_device_train_batch_size: 4, max_steps: 2, learning_rate: 1e-3}}}}
ppo: {{training: {{per_device_train_batch_size: 4, max_steps: 2, response_length: 6, learning_rate: 1e-3}}}}
evaluation: {{samples: 1, max_new_tokens: 6, greedy: false}}
round: {{answers: 3, max_new_tokens: 6, batch_size: 6}}
"""


def letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def likes_letters(prompts, completions, **rest):
    return [letters(text) for text in completions]


LETTERS = Judge(f"{__name__}:likes_letters")


def make_run(here: Path, tiny_path: Path) -> Path:
    """The whole loop, of two steps a stage."""
    write_records(here / "d.jsonl", [{"prompt": f"say {word}", "completion": f"{word}!"} for word in WORDS])
    write_records(here / "c.jsonl", [{"prompt": f"ask {word}", "chosen": f"{word}!", "rejected": "?"} for word in WORDS])
    (here / "recipe.yaml").write_text(RECIPE.format(model=tiny_path, here=here))
    run_loop(load_loop(here / "recipe.yaml"), here / "run")
    return here / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_path) -> Path:
    return make_run(tmp_path_factory.mktemp("made"), tiny_path)


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def state(run: Path, number: int = 1) -> dict:
    return json.loads((run / "rounds" / f"{number:02d}" / "round.json").read_text())


def collected(run: Path, file: Path | None = None, judge: Judge | None = None, *, wait: bool = False) -> bool:
    """The round as far as the votes; whether there were enough of them, so that training would begin."""
    current = rounds.Round.current(run, (), in_this_process, lambda line: None)
    current.begin()
    return current.collect(file, judge, wait) is None


def vote(run: Path, voter: str = "ann") -> None:
    store = Store(run, votes_per_minute=None)
    key = store.voter(name=voter).key
    for row in store.waiting(key):
        showing = store.show(row.item, key)
        most = max(map(letters, showing.answers))
        store.vote(showing.ticket, key, Ballot(tuple(int(letters(text) < most) for text in showing.answers)))
    store.close()


def test_a_round_waits_for_votes_then_learns_and_the_next_one_starts_from_its_policy(run):
    before = {name: Adapter.load(run / name).sha256 for name in ("sft", "reward", "ppo")}
    waiting = run_round(run)
    assert waiting.report is None
    assert (waiting.votes, waiting.wanted) == (0, len(state(run)["items"]))
    vote(run)
    first = run_round(run)
    assert first.report is not None
    votes = state(run)["votes"]
    assert votes["used"] + sum(votes["left_out"].values()) == votes["new"] == waiting.wanted
    assert 0 < votes["used"] == votes["rankings"]
    reward, ppo = Adapter.load(first.directory / "reward"), Adapter.load(first.directory / "ppo")
    assert reward.manifest.parents == {"sft": before["sft"], "reward": before["reward"]}, "it goes on, not from scratch"
    assert ppo.manifest.parents == {"reward": reward.sha256, "sft": before["sft"], "policy": before["ppo"]}
    assert [row["b"] for row in state(run)["metrics"]["win_rates"]][:2] == ["sft", "ppo"]
    assert (first.directory / "report" / "report.md").is_file()

    second = run_round(run, judge=LETTERS)
    assert second.number == 2
    assert Adapter.load(second.directory / "ppo").manifest.parents["policy"] == ppo.sha256
    assert Adapter.load(second.directory / "reward").manifest.parents["reward"] == reward.sha256
    assert state(run, 2)["votes"]["voters"] == 1, "the votes of the first round are not used again"
    old = read_records(str(run / "data" / "reward.jsonl"))
    assert state(run, 2)["votes"]["old_comparisons"] == len(old) + state(run)["votes"]["rankings"]
    assert {"sft", "round-1", "round-2"} == {row["candidate"] for row in answers_of(second.directory)}
    assert {name: Adapter.load(run / name).sha256 for name in before} == before, "the run itself is as it was"


def answers_of(directory: Path) -> list[dict]:
    lines = (directory / "report" / "answers.jsonl").read_text().rstrip("\n").split("\n")
    return [answer for line in lines for answer in json.loads(line)["answers"]]


def right(run: Path, reward: Path) -> float:
    """How many pairs of the votes a reward adapter orders as the voter did."""
    groups = read_records(str(run / "rounds" / "01" / "data" / "votes.jsonl"))
    scores = load_scorer(reward)
    by_group = [scores([(row["prompt"], text) for text in row["responses"]]) for row in groups]
    found, pairs = right_pairs(by_group, groups)
    return found / pairs


def test_what_is_voted_for_becomes_the_better_answer_to_the_reward_model(run):
    learning = ["reward.training.max_steps=40", "reward.training.learning_rate=1e-2"]
    run_round(run, [*learning, "round.replay=2", "round.vote_weight=2"], judge=LETTERS)
    data = run / "rounds" / "01" / "data"
    votes, trained = read_records(str(data / "votes.jsonl")), read_records(str(data / "reward.jsonl"))
    for row in votes:
        best = [text for text, rank in zip(row["responses"], row["ranks"], strict=True) if rank == min(row["ranks"])]
        assert {letters(text) for text in best} == {max(map(letters, row["responses"]))}
    assert trained[: len(votes)] == trained[len(votes) : 2 * len(votes)] == votes
    assert len(trained) == 2 * len(votes) + 2
    before, after = right(run, run / "reward"), right(run, run / "rounds" / "01" / "reward")
    assert after > max(0.9, before)


OTHERWISE = ["round.max_new_tokens=4"]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """A run with a round that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(made, path)
    run_round(path, OTHERWISE, judge=LETTERS)
    return path


@pytest.mark.parametrize(
    ("where", "name"),
    [(drawing, "_batch"), (rounds, "put_up"), (rounds, "export"), (rounds, "train"), (rounds, "_evaluate")],
    ids=["drawing", "putting up", "export", "training", "report"],
)
def test_what_is_killed_anywhere_goes_on(run, whole, monkeypatch, where, name):
    if name == "put_up":
        where = drawing
    original, calls = getattr(where, name), []

    def killed(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2 or name not in ("_batch", "train"):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, killed)
    with pytest.raises(KeyboardInterrupt):
        run_round(run, OTHERWISE, judge=LETTERS)
    monkeypatch.setattr(where, name, original)
    result = run_round(run, judge=LETTERS)  # the options are kept for the round
    assert result.number == 1
    for file in ("data/answers.jsonl", "data/votes.jsonl", "data/reward.jsonl"):
        assert (result.directory / file).read_bytes() == (whole / "rounds" / "01" / file).read_bytes()
    assert state(run)["adapters"] == state(whole)["adapters"]
    store = Store(run)
    assert len(store.votes()) == len(state(run)["items"]), "no vote twice"


def test_half_a_line_of_answers_is_written_again(run):
    run_round(run)
    path = run / "rounds" / "01" / "data" / "answers.jsonl"
    whole = path.read_bytes()
    settings = drawing.Drawing(**{key: value for key, value in state(run)["drawing"].items() if key != "prompt_limit"})
    path.write_bytes(whole[: len(whole) // 2])
    drawing.draw_answers(path, path.with_name("asked.jsonl"), run / "ppo", run / "reward", settings)
    assert path.read_bytes() == whole


def test_votes_from_a_file_make_a_round_go_on_and_bad_lines_are_named(run, tmp_path):
    run_round(run)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "x", "rejected": "y"}\n{"prompt": "a", "chosen": ""}\n')
    with pytest.raises(BadRecords, match=r"bad\.jsonl:2: "):
        run_round(run, votes=bad)
    assert not Store(run).votes()
    held_out = read_records(str(run / "data" / "heldout.jsonl"))[0]["prompt"]
    good = tmp_path / "good.jsonl"
    write_records(good, [{"prompt": prompt, "chosen": "long enough", "rejected": "no"} for prompt in ("b", "c", held_out)])
    assert collected(run, good)
    votes = state(run)["votes"]
    assert votes["used"] == 2
    assert votes["left_out"] == {"a held-out prompt": 1}


def test_prompts_that_are_held_out_are_refused_with_their_lines(run, tmp_path):
    file, held_out = tmp_path / "prompts.jsonl", opening(read_records(str(run / "data" / "heldout.jsonl"))[0])
    write_records(file, [{"prompt": "new"}, {"prompt": held_out.upper()}])
    with pytest.raises(BadRecords, match=r"prompts\.jsonl:2: is a held-out prompt"):
        run_round(run, [f"round.prompts={file}"])
    assert not (run / "rounds").exists()
    write_records(file, [{"prompt": f"new {number}"} for number in range(5)])
    waiting = run_round(run, [f"round.prompts={file}", "round.prompt_limit=2"])
    assert waiting.wanted == 2
    assert len(read_records(str(waiting.directory / "data" / "prompts.jsonl"))) == 5


def test_other_options_than_those_of_the_answers_that_are_up_for_voting_are_refused(run):
    run_round(run)
    with pytest.raises(InstructLiteError, match="begun with other drawing"):
        run_round(run, ["round.answers=2"])
    assert run_round(run, ["round.votes=1"]).wanted == 1


def test_wrong_options_are_one_line_before_anything_is_drawn(run):
    with pytest.raises(InstructLiteError, match=r"round.answers=1: 2 to 9"):
        run_round(run, ["round.answers=1"])
    with pytest.raises(InstructLiteError, match="max_step"):
        run_round(run, ["ppo.training.max_step=1"])
    shutil.rmtree(run / "reward")
    with pytest.raises(InstructLiteError, match="no reward adapter there; finish the run first"):
        run_round(run)
    assert not (run / "rounds").exists()


def test_votes_that_teach_nothing_stop_the_round_and_it_can_go_on(run):
    run_round(run)
    store = Store(run, votes_per_minute=None)
    key = store.voter(name="undecided").key
    for row in store.waiting(key):
        showing = store.show(row.item, key)
        store.vote(showing.ticket, key, Ballot.tie(len(showing.answers)))
    with pytest.raises(InstructLiteError, match="nothing can be learnt from these"):
        run_round(run)
    vote(run)
    assert collected(run)


def test_waiting_ends_when_the_votes_are_there(run, monkeypatch):
    run_round(run)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        vote(run)

    monkeypatch.setattr(rounds.time, "sleep", sleep)
    assert not collected(run)
    assert collected(run, wait=True)
    assert slept == [rounds.POLL_SECONDS]


def test_a_reward_adapter_judges_as_it_scores(run):
    run_round(run)
    rounds.cast_by(run, state(run)["items"], Judge(str(run / "judge")))
    votes = Store(run).votes()
    assert len(votes) == len(state(run)["items"])
    score = voting.by_score(lambda pairs: [float(len(text)) for _, text in pairs])
    assert score([([], ("a", "ccc", "bb", "dd"))]) == [[2, 0, 1, 1]]
    scorer = load_scorer(run / "judge")
    for vote in votes:
        scores = scorer([(vote.prompt, answer.text) for answer in vote.answers])
        by_rank = [score for _, score in sorted(zip([answer.rank for answer in vote.answers], scores, strict=True))]
        assert by_rank == sorted(scores, reverse=True)


def test_a_judge_that_is_none_is_one_line(run):
    run_round(run)
    for who, why in (("nobody", "no reward adapter there"), (f"{__name__}:nobody", "no function of that name")):
        with pytest.raises(InstructLiteError, match=why):
            rounds.cast_by(run, state(run)["items"], Judge(who))


def test_how_far_the_last_reward_model_agreed_with_the_voters_is_measured(run):
    run_round(run)
    assert collected(run, judge=Judge(str(run / "reward")))
    votes = state(run)["votes"]
    assert votes["reward_pairs"] >= votes["used"]
    assert votes["reward_agreement"] == 1


def test_the_command_says_how_to_vote_and_how_to_go_on(run, monkeypatch):
    monkeypatch.setattr(rounds, "in_own_process", lambda function, *args, interruption: in_this_process(function, *args))
    shown = CliRunner().invoke(app, ["round", str(run), "round.prompt_limit=2"])
    assert shown.exit_code == 0
    assert f"0 of 2 votes are there. To vote: instructlite app {run}\n" in shown.output
    assert f"instructlite round {run}\n" in shown.output
    shown = CliRunner().invoke(app, ["round", str(run), "--judge", LETTERS.who])
    assert shown.exit_code == 0
    assert "Round 1 is in" in shown.output
