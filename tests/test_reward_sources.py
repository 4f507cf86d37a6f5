"""Where PPO's score comes from: adapters, ensembles, functions with TRL's signature (T-22), another model; and what becomes of it."""

import asyncio
import json
import shutil
import sys

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from test_ppo_trainer import EVERYTHING, PTX, all_state, config, digest, losses, roles, share_of_vowels, trainer_of
from torch.testing import assert_close
from transformers import LlamaForSequenceClassification
from trl import RLOOConfig, RLOOTrainer

from instructlite import PPORecipe, RewardRecipe
from instructlite.config import Lora, RewardOptions, load_loop
from instructlite.data.records import read_records
from instructlite.errors import InstructLiteError
from instructlite.models.base import Base, load_base
from instructlite.models.manifest import Adapter
from instructlite.models.roles import RoleModel
from instructlite.pipeline import prepare_data, run_loop
from instructlite.training.ppo_trainer import PPOTrainer
from instructlite.training.reward import RankingTrainer
from instructlite.training.reward_sources import FunctionReward, RolloutReward, SeparateModelReward, load_function, source_of
from instructlite.training.rewards import Objective, Rewards, ScoreScale, combine_scores, in_words, rewards_of
from instructlite.training.rollout import Rollout

SUM = lambda x: x  # noqa: E731  (one process: nothing to sum)


def answered(base: Base, texts: list[str], prompts: list | None = None, ended: bool = True, **columns) -> Rollout:
    """A rollout of given answers, each with its end token."""
    prompts = prompts or [[{"role": "user", "content": f"say {text}"}] for text in texts]
    rows = [{"prompt": prompt, "prompt_ids": base.encode_prompt(prompt)} for prompt in prompts]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    answers = [base.encode_completion(text)[: None if ended else -1] for text in texts]
    left, right = max(len(row["prompt_ids"]) for row in rows), max(map(len, answers))
    ids = torch.tensor(
        [
            [base.pad_id] * (left - len(row["prompt_ids"])) + row["prompt_ids"] + answer + [base.pad_id] * (right - len(answer))
            for row, answer in zip(rows, answers, strict=True)
        ]
    )
    mask = torch.arange(right) < torch.tensor([len(answer) for answer in answers])[:, None]
    attention = torch.cat([ids[:, :left] != base.pad_id, mask], 1).long()
    return Rollout(rows, ids, attention, mask, torch.full((len(texts),), ended), tokenizer=base.tokenizer)


def scored(rollout: Rollout, *sources, normalization: str = "none", clip: float | None = None, **options):
    rewards = rewards_of(list(sources), **options)
    rewards.prepare(normalization, clip)
    rewards.score(rollout)
    rewards.update(rollout, SUM)
    return rewards.combine(rollout, SUM)


def fresh(tiny_path, *more: str, **options) -> RoleModel:
    """The roles of PPO, and further reward roles with weights and heads of their own."""
    model = roles(load_base(tiny_path, dtype="float32", chat_template="chatml"), **options)
    for number, role in enumerate(more, 1):
        model.copy_role("reward", role)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.role_parameters(role):
                parameter.normal_(std=0.3)
            model.heads[role].bias.add_(100 * number)
    return model


# --- T-22: functions with TRL's signature -------------------------------------------------------------------------------


def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def only_some(prompts, completions, completion_ids, target, trainer_state, log_extra, log_metric):
    """Names every argument, has nothing to say of some rows, and logs."""
    log_metric("hits", sum(t is not None for t in target))
    log_extra("target", list(target))
    return [None if t is None else t + len(ids) for t, ids in zip(target, completion_ids, strict=True)]


async def asks_somebody(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [len(p[-1]["content"]) - 0.5 * len(c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]


class Counts:
    """A callable object, as TRL takes it too."""

    async def __call__(self, completion_ids, **kwargs):
        return [len(ids) for ids in completion_ids]


FUNCTIONS = [length, only_some, asks_somebody, Counts()]
WEIGHTS = [1.0, 0.25, -2.0, 0.5]


@pytest.mark.filterwarnings("ignore")
def test_t22_the_same_functions_give_the_same_rewards_in_trl(tiny_base, tiny_path, tmp_path):
    rollout = answered(tiny_base, ["yes", "no no", "", "perhaps"], target=[1.5, None, 3, None])
    args = RLOOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, reward_weights=WEIGHTS, report_to=[], use_cpu=True,
        bf16=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "a"}] * 4)
    trainer = RLOOTrainer(str(tiny_path), list(FUNCTIONS), args=args, train_dataset=data, processing_class=tiny_base.tokenizer)
    inputs = [{name: value for name, value in row.items() if name != "prompt_ids"} for row in rollout.rows]
    theirs = trainer._calculate_rewards(inputs, rollout.prompts, rollout.completions, rollout.completion_ids)
    result = scored(rollout, *FUNCTIONS, weights=WEIGHTS)
    ours = torch.stack(list(rollout.raw_scores.values()), 1)
    assert ours.isnan().sum() == 2
    assert torch.equal(ours.nan_to_num(-99), theirs.nan_to_num(-99))
    assert list(rollout.raw_scores) == trainer.reward_func_names
    assert_close(result.total, (theirs * trainer.reward_weights).nansum(1))
    assert rollout.logged_metrics == {name: values[0] for name, values in trainer._pending_metrics.items()} == {"hits": 2}
    assert rollout.logged_columns == trainer._pending_extra_logs == {"target": [1.5, None, 3, None]}


def test_t22_functions_see_the_conversation_or_the_text_as_the_data_set_has_it(tiny_base):
    seen = {}

    def look(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0] * len(prompts)

    scored(answered(tiny_base, ["ab", "c"], topic=["x", "y"]), look)
    assert seen["completions"] == [[{"role": "assistant", "content": "ab"}], [{"role": "assistant", "content": "c"}]]
    assert seen["prompts"][1] == [{"role": "user", "content": "say c"}] and seen["topic"] == ["x", "y"]
    assert seen["completion_ids"] == [tiny_base.encode_completion("ab"), tiny_base.encode_completion("c")], "the end token is an action"
    assert set(seen) == {"prompts", "completions", "completion_ids", "topic", "trainer_state", "log_extra", "log_metric"}
    scored(answered(tiny_base, ["ab", "c"], prompts=["p", "q"]), look)
    assert seen["prompts"] == ["p", "q"] and seen["completions"] == ["ab", "c"]


def test_t22_none_is_left_out_of_the_sum_and_of_the_statistics(tiny_base):
    half = lambda completions, **kwargs: [2.0, None, 6.0, None]  # noqa: E731
    result = scored(answered(tiny_base, list("abcd")), length, half, weights=[1.0, 10.0])
    assert result.total.tolist() == [21.0, 1.0, 61.0, 1.0] and result.judged.all()
    assert result.metrics["rewards/<lambda>/mean"] == 4 and result.metrics["rewards/<lambda>/std"] == 2
    normalised = scored(answered(tiny_base, list("abcd")), half, length, normalization="first_rollout")
    assert_close(normalised.total, torch.tensor([-1.0, 0.0, 1.0, 0.0]))


def test_t22_a_response_that_nobody_judges_teaches_nothing(tiny_path, tmp_path):
    quiet = lambda completions, **kwargs: [None if i % 2 else float(i) for i in range(len(completions))]  # noqa: E731
    args = config(tmp_path, per_device_train_batch_size=4, num_mini_batches=1, max_steps=1)
    trainer = trainer_of(fresh(tiny_path), args, reward_model=quiet)
    with pytest.warns(UserWarning, match="every reward source returned None for 2 of 4 responses.*'prompt'"):
        batch = trainer._collect(trainer.train_dataset[:4], 0)
    assert (batch.advantages[1::2] == 0).all() and (batch.advantages[::2] != 0).any()
    assert torch.equal(batch.returns[1::2], batch.values[1::2])
    learned = batch.advantages[::2][batch.mask[::2]]
    assert_close(learned.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(learned.std(unbiased=False), torch.tensor(1.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ([1.0], "returned 1 rewards for 2 responses"),
        (None, "returned None for 2 responses"),
        ([1.0, "high"], "returned 'high' where a number belongs"),
        ([1.0, float("nan")], "returned nan: scores are not finite"),
        ([1.0, [0.1, 0.2]], "2 values for 3 tokens"),
        ([1.0, [(3, 1.0)]], "3 lies outside of its 3 tokens and 2 characters"),
        ([1.0, [((0, 3), 1.0)]], "lies outside of its 3 tokens and 2 characters"),
    ],
)
def test_t22_what_a_function_may_not_return_is_one_line_with_its_name(tiny_base, output, said):
    def judge(**kwargs):
        return output

    with pytest.raises(InstructLiteError, match="'judge'") as error:
        scored(answered(tiny_base, ["a", "bc"]), judge)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_t22_async_functions_run_together_and_on_one_loop(tiny_base):
    meetings = {}

    def meets(mine: str, other: str):
        async def judge(prompts, **kwargs):
            loops.append(asyncio.get_running_loop())
            meetings.setdefault(mine, asyncio.Event()).set()
            await asyncio.wait_for(meetings.setdefault(other, asyncio.Event()).wait(), 5)  # for ever, were they one after the other
            return [1.0] * len(prompts)

        return FunctionReward(judge, mine)

    loops = []
    for _ in range(2):
        meetings.clear()
        assert scored(answered(tiny_base, ["a"]), meets("x", "y"), meets("y", "x")).total.tolist() == [2.0]
    assert len(loops) == 4 and len(set(loops)) == 1
    with pytest.raises(InstructLiteError, match="returned 0 rewards for 1 responses"):
        scored(answered(tiny_base, ["a"]), FunctionReward(_returns_nothing))


async def _returns_nothing(**kwargs):
    return []


def test_t22_a_signature_that_trl_could_not_call_is_refused():
    said = r"'f' does not take completion_ids, trainer_state, log_extra, log_metric: end its signature with \*\*kwargs"
    with pytest.raises(InstructLiteError, match=said):
        source_of(lambda prompts, completions: [], "f")


def test_the_trainer_state_and_the_columns_reach_a_function_and_its_metrics_the_log(tiny_path, tmp_path):
    steps = []

    def judge(prompts, completions, level, trainer_state, log_metric, **kwargs):
        steps.append(trainer_state.global_step)
        log_metric("mean_level", sum(level) / len(level))
        return [x + len(c) for x, c in zip(level, completions, strict=True)]

    prompts = [{"prompt": f"{i} ", "level": i % 2} for i in range(8)]
    trainer = trainer_of(fresh(tiny_path), config(tmp_path, max_steps=8), prompts=prompts, reward_model=judge, eval_dataset=prompts[:2])
    trainer.train()
    assert steps == [0, 4]
    assert [log["mean_level"] for log in trainer.state.log_history if "mean_level" in log]
    assert "rewards/judge/mean" in trainer.state.log_history[0] and "eval_rewards/judge/mean" in trainer.evaluate()


def test_a_function_that_fails_in_the_middle_leaves_a_checkpoint(tiny_path, tmp_path):
    def fails_later(completions, trainer_state, **kwargs):
        return [1.0 + len(c) for c in completions] if trainer_state.global_step == 0 else []

    trainer = trainer_of(fresh(tiny_path), config(tmp_path, max_steps=8), reward_model=fails_later)
    with pytest.raises(InstructLiteError, match="step 4: .*'fails_later' returned 0 rewards.*checkpoint-4"):
        trainer.train()
    assert (tmp_path / "checkpoint-4" / "ppo_state.json").is_file()


# --- rewards inside a response ------------------------------------------------------------------------------------------


def test_rewards_of_spans_land_on_the_tokens_that_end_them(tiny_base):
    text = "Né. Oh 😀!"  # in the byte tokenizer é has two tokens and the smiley four
    given = [[((0, 2), 0.5), ((0, 3), 1.0), ((4, 8), 2.0)], 7.0, None, [(0, 3.0), (0, 1.0), (1, -1.0)]]
    spans = lambda completions, **kwargs: given  # noqa: E731
    rollout = answered(tiny_base, [text, "ab", "c", "d"])
    result = scored(rollout, spans)
    assert rollout.completion_ids[0][:3] == tiny_base.tokenizer("Né")["input_ids"]
    expected = torch.zeros(rollout.mask.shape)
    expected[0, 2], expected[0, 3], expected[0, len("Né. Oh 😀".encode()) - 1] = 0.5, 1.0, 2.0
    expected[1, 2], expected[3, 0], expected[3, 1] = 7.0, 4.0, -1.0
    assert torch.equal(result.tokens, expected)
    assert result.total.tolist() == [3.5, 7.0, 0.0, 3.0] and result.judged.tolist() == [True, True, False, True]
    assert result.last.tolist() == [0.0] * 4
    assert result.metrics["rewards/<lambda>/mean"] == pytest.approx(4.5)


@pytest.mark.parametrize("normalization", ["none", "first_rollout"])
def test_rewards_of_tokens_reach_their_own_step_and_sum_to_the_score(normalization, tiny_path, tmp_path):
    """With V = 0, no KL and gamma = lambda = 1 the return of a token is the sum of the rewards from there on."""
    given = {}

    def each_token(completion_ids, **kwargs):
        given["ids"] = completion_ids
        return [[id % 7 / 7 for id in ids] for ids in completion_ids]

    args = config(
        tmp_path, per_device_train_batch_size=4, num_mini_batches=1, kl_coef=0.0, lam=1.0, score_normalization=normalization,
        score_clip=None,
    )  # fmt: skip
    trainer = trainer_of(fresh(tiny_path), args, reward_model=each_token)
    batch = trainer._collect(trainer.train_dataset[:4], 0)
    rewards = batch.returns - torch.nn.functional.pad(batch.returns[:, 1:], (0, 1))
    for row, ids in enumerate(given["ids"]):
        values = torch.tensor([id % 7 / 7 for id in ids]) / trainer.scale.std
        values[-1] -= trainer.scale.mean / trainer.scale.std  # what the normalisation takes off the sum is taken off the end
        assert_close(rewards[row, : len(ids)], values, atol=1e-5, rtol=0)
        assert_close(batch.scores[row], values.sum(), atol=1e-5, rtol=0)


def test_a_source_may_give_a_tensor_for_every_token_and_padding_does_not_count(tiny_base):
    rollout = answered(tiny_base, ["abc", "d"])
    everywhere = RolloutReward(lambda batch: torch.ones(batch.mask.shape), "everywhere")
    assert scored(rollout, everywhere).total.tolist() == [4.0, 2.0]
    with pytest.raises(InstructLiteError, match=r"everywhere gave scores of shape \(3,\) for 2 responses"):
        scored(rollout, RolloutReward(lambda batch: torch.ones(3), "everywhere"))


def test_clipping_the_score_takes_the_excess_off_the_last_token(tiny_base):
    result = scored(answered(tiny_base, ["abc", "d"]), lambda completions, **kwargs: [[(0, 4.0), (1, 2.0)], -9.0], clip=5.0)
    assert result.total.tolist() == [5.0, -5.0] and result.clipped.all()
    assert_close(result.last + result.tokens.sum(1), result.total)
    assert result.tokens[0].tolist() == [4.0, 2.0, 0.0, 0.0] and result.last[0] == -1


# --- ensembles ------------------------------------------------------------------------------------------------------------


def test_ensembles_combine_by_hand():
    scores = torch.tensor([[1.0, 0.0, 5.0], [3.0, -2.0, 5.0]])
    assert combine_scores(scores, "mean", 0.5).tolist() == [2.0, -1.0, 5.0]
    assert combine_scores(scores, "min", 0.5).tolist() == [1.0, -2.0, 5.0]
    assert combine_scores(scores, "mean_minus_std", 0.5).tolist() == [1.5, -1.5, 5.0]


def ensemble(rollout: Rollout, *members: torch.Tensor, combine: str, normalization: str = "first_rollout"):
    sources = [RolloutReward(lambda batch, scores=scores: scores, f"member {n}") for n, scores in enumerate(members)]
    rewards = Rewards([Objective("reward", sources, combine=combine)])
    rewards.prepare(normalization, None)
    rewards.score(rollout)
    rewards.update(rollout, SUM)
    return rewards.combine(rollout, SUM)


def test_members_are_normalised_before_they_are_combined(tiny_base):
    """A member that scores 100 higher, or ten times as far apart, weighs no more for that, and never wins or loses by it."""
    rollout = answered(tiny_base, list("abcd"))
    x = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    y = torch.tensor([0.0, -1.0, 1.0, 0.0])
    plain = {how: ensemble(rollout, x, y, combine=how).total for how in ("mean", "min", "mean_minus_std")}
    moved = {how: ensemble(rollout, x, 10 * y + 100, combine=how).total for how in plain}
    for how in plain:
        assert_close(plain[how], moved[how])
    assert_close(plain["min"], torch.minimum(x, y) * 2**0.5)
    assert_close(plain["mean_minus_std"], ((x + y) / 2 - 0.5 * (x - y).abs() / 2) * 2**0.5)
    unnormalised = ensemble(rollout, x, 10 * y + 100, combine="min", normalization="none").total
    assert torch.equal(unnormalised, x), "the test must see what happens without"


def test_the_disagreement_of_an_ensemble_is_logged(tiny_base):
    rollout = answered(tiny_base, list("abcd"))
    x = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    assert ensemble(rollout, x, x + 5, combine="mean").metrics["reward/ensemble_std"] == 0
    apart = ensemble(rollout, x, -x, combine="mean").metrics
    assert apart["reward/ensemble_std"] == pytest.approx(2**0.5 / 2)
    assert apart["rewards/reward-1/mean"] == 0 and apart["rewards/reward/std"] == 0
    assert "reward/ensemble_std" not in scored(rollout, length).metrics


def trained(model: RoleModel, args, **options) -> tuple[PPOTrainer, torch.Tensor]:
    trainer = trainer_of(model, args, **options)
    trainer.train()
    return trainer, torch.cat([p.flatten() for role in ("policy", "value") for p in model.role_parameters(role)])


@pytest.mark.parametrize("combine", ["mean", "min", "mean_minus_std"])
def test_an_ensemble_of_three_equal_members_equals_one(combine, tiny_path, tmp_path):
    alone, weights = trained(fresh(tiny_path, top_layers=2), config(tmp_path))
    model = fresh(tiny_path, top_layers=2)
    for role in ("second", "third"):
        model.copy_role("reward", role)
    rewards = rewards_of({"all": ["reward", "second", "third"]}, combine=combine, roles=dict.fromkeys(model.roles))
    together, same = trained(model, config(tmp_path), reward_model=rewards)
    assert_close(same, weights, atol=1e-6, rtol=0)
    ours, theirs = (trainer.state.log_history[0] for trainer in (together, alone))
    assert ours["objective/score"] == pytest.approx(theirs["objective/score"], abs=1e-6) and ours["reward/ensemble_std"] == 0
    assert ours["rewards/all-2/mean"] == theirs["rewards/reward/mean"]


def test_objectives_are_weighed_after_each_was_normalised(tiny_path, tmp_path):
    model = fresh(tiny_path, "harmless")
    weights = {"helpful": 0.7, "harmless": 0.3}
    rewards = rewards_of({"helpful": "reward", "harmless": "harmless"}, weights=weights, roles=dict.fromkeys(model.roles))
    trainer = trainer_of(model, config(tmp_path, per_device_train_batch_size=8, num_mini_batches=1, score_clip=None), reward_model=rewards)
    batch = trainer._collect(trainer.train_dataset[:8], 0)
    raw = [batch.raw_scores[name] for name in ("helpful", "harmless")]
    z = [(scores - scores.mean()) / scores.std(unbiased=False) for scores in raw]
    assert raw[1].mean() > 50 > raw[0].mean(), "one of them lies far above the other"
    assert_close(batch.scores, 0.7 * z[0] + 0.3 * z[1], atol=1e-4, rtol=0)
    for name, scores in zip(("helpful", "harmless"), raw, strict=True):  # logged as they came, before weight and scale
        logged = trainer._metrics.means()
        assert logged[f"rewards/{name}/mean"] == pytest.approx(scores.mean().item(), rel=1e-5)
        assert logged[f"rewards/{name}/std"] == pytest.approx(scores.std(unbiased=False).item(), rel=1e-4)


# --- scales ---------------------------------------------------------------------------------------------------------------


def test_running_statistics_are_those_of_all_scores_so_far():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, generator=generator) * 3 + 1000 + 10 * n for n in (5, 1, 8)]
    running, fixed = ScoreScale(running=True), ScoreScale()
    for batch in batches:
        running.update(torch.cat([batch, torch.tensor([torch.nan])]), SUM)
        fixed.update(batch, SUM)
    everything = torch.cat(batches).double()
    assert running.mean == pytest.approx(everything.mean().item(), rel=1e-12)
    assert running.std == pytest.approx(everything.std(unbiased=False).item(), rel=1e-9)
    assert fixed.mean == pytest.approx(batches[0].double().mean().item(), rel=1e-12), "only the first rollout's"


def test_statistics_are_over_all_processes():
    """Two processes as one sum: what `reduce` adds is what the other one has."""
    mine, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 10.0, 4.0])
    both = torch.cat([mine, other]).double()
    sums = iter([torch.tensor([3.0, 17.0]).double(), ((other.double() - both.mean()) ** 2).sum()])
    scale = ScoreScale(running=True)
    scale.update(mine, lambda x: x + next(sums))
    assert (scale.count, scale.mean, scale.std) == (5, pytest.approx(both.mean().item()), pytest.approx(both.std(unbiased=False).item()))


@pytest.mark.parametrize("value", [0.0, 0.3, 1e6 + 0.1])
def test_constant_scores_keep_their_scale(value):
    scale = ScoreScale()
    scale.update(torch.full((7,), value), SUM)
    assert scale.std == 1.0 and scale(torch.full((7,), value)).abs().max() < 0.1


def test_t12_resuming_is_exact_with_an_ensemble_a_function_and_a_running_scale(tiny_path, tmp_path):
    def start(output, **changes):
        model = fresh(tiny_path, "second", "third", top_layers=2)
        rewards = rewards_of(
            {"all": ["reward", "second", "third"], "vowels": share_of_vowels}, weights={"vowels": 0.3}, combine="min",
            roles=dict.fromkeys(model.roles),
        )  # fmt: skip
        options = EVERYTHING | dict(score_normalization="running", max_steps=8) | changes
        return trainer_of(model, config(output, **options), ptx_dataset=PTX, reward_model=rewards)

    whole = start(tmp_path / "whole")
    whole.train()
    assert whole.rewards.objectives[0].scales[2].count == 16
    for k in (1, 4, 6):
        torch.manual_seed(1000 + k)
        resumed = start(tmp_path / "resumed", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{k}"))
        assert all_state(resumed) == all_state(whole), f"resumed after step {k}"
        assert resumed.rewards.state() == whole.rewards.state() and losses(resumed) == losses(whole)


def test_resuming_with_other_weights_or_sources_is_refused(tiny_path, tmp_path):
    start = lambda weight: trainer_of(  # noqa: E731
        fresh(tiny_path), config(tmp_path, save_strategy="steps", save_steps=4),
        reward_model=rewards_of([share_of_vowels, length_of_rollout], weights=[1.0, weight]),
    )  # fmt: skip
    start(0.5).train()
    with pytest.raises(InstructLiteError, match="rewards: .*0.5 x.* then, .*0.6 x.* now"):
        start(0.6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def length_of_rollout(batch: Rollout) -> torch.Tensor:
    return batch.mask.sum(1).float()


# --- the value function that starts as the reward model -------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["first_rollout", "none"])
def test_the_value_function_of_an_ensemble_starts_as_its_first_member_on_its_scale(normalization, tiny_path, tmp_path):
    model = fresh(tiny_path)
    model.copy_role("reward", "second")
    model.heads["value"].load_state_dict(model.heads["reward"].state_dict())
    rewards = rewards_of({"all": ["reward", "second"]}, weights={"all": 2.0}, roles=dict.fromkeys(model.roles))
    args = config(tmp_path, per_device_train_batch_size=4, num_mini_batches=1, score_normalization=normalization, score_clip=None)
    trainer = trainer_of(model, args, reward_model=rewards)
    batch = trainer._collect(trainer.train_dataset[:4], 0)
    states = slice(batch.input_ids.shape[1] - batch.mask.shape[1], None)
    with torch.no_grad(), model.active("value"):
        v = model.scores("value", model.hidden(batch.input_ids, batch.attention_mask)[:, states])
    assert_close(v.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0], batch.scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "options", "normalization"),
    [
        ({"all": ["reward", "second"]}, {"combine": "min"}, "first_rollout"),
        ({"all": ["reward", "second"]}, {"combine": "mean_minus_std"}, "first_rollout"),
        (["reward", share_of_vowels], {}, "first_rollout"),
        ({"a": "reward", "b": "second"}, {}, "first_rollout"),
        ("reward", {}, "running"),
    ],
)
def test_a_score_that_no_reward_head_can_give_is_no_start_for_the_value_function(given, options, normalization, tiny_path, tmp_path):
    model = fresh(tiny_path, "second")
    rewards = rewards_of(given, roles=dict.fromkeys(model.roles), **options)
    trainer_of(model, config(tmp_path, score_normalization=normalization), reward_model=rewards)  # a zero head is a start for all
    model.heads["value"].load_state_dict(model.heads["reward"].state_dict())
    with pytest.raises(InstructLiteError, match="use value_from=sft, a zero head"):
        trainer_of(model, config(tmp_path, score_normalization=normalization), reward_model=rewards)


# --- what a user may give ---------------------------------------------------------------------------------------------------


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("NUMBER = 3\n\ndef brevity(completions, **kwargs):\n    return [-1.0 for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_rewards", None)


def test_a_recipe_names_a_function_by_its_module(my_rewards, tiny_base):
    assert scored(answered(tiny_base, ["a"]), "my_rewards:brevity").metrics["rewards/brevity/mean"] == -1
    for path, said in {
        "my_rewards:gravity": "my_rewards has no function gravity", "my_rewards:NUMBER": "has no function NUMBER",
        "your_rewards:brevity": "no module your_rewards here", "runs/reward": "neither a reward adapter's directory, nor module:function",
    }.items():  # fmt: skip
        with pytest.raises(InstructLiteError, match=said):
            load_function(path)


def test_what_a_run_notes_of_its_rewards_is_the_same_in_every_process(my_rewards, tmp_path):
    given = {"a": length, "b": ["my_rewards:brevity", tmp_path], "c": {"model": "m", "max_length": 4}, "d": FunctionReward(length, "x")}
    assert in_words(given) == {
        "a": "test_reward_sources:length", "b": ["my_rewards:brevity", str(tmp_path)], "c": {"model": "m", "max_length": 4}, "d": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([length, length], {}, "two sources are named length"),
        ([length], {"weights": [1.0, 2.0]}, "2 weights for 1 sources"),
        ([length], {"weights": {"width": 1.0}}, "there is no source width; there are length"),
        ([], {}, "there is none"),
        (3, {}, "neither a reward adapter"),
        ({"policy": "reward"}, {"roles": {"reward": None}}, "'policy': its name may"),
    ],
)
def test_rewards_that_cannot_be_are_one_line(given, options, said):
    with pytest.raises(InstructLiteError, match=said) as error:
        rewards_of(given, **options)
    assert "\n" not in str(error.value)


# --- another model with its own tokenizer -----------------------------------------------------------------------------------


@pytest.fixture
def other_model(tmp_path):
    """A reward model of another size, with another template."""
    torch.manual_seed(5)
    path = tmp_path / "judge-1.5"
    LlamaForSequenceClassification(tiny_config(hidden_size=16, num_labels=1, dtype=torch.bfloat16)).to(torch.bfloat16).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def test_a_separate_model_scores_text_in_its_own_template(other_model, tiny_base):
    texts = ["yes", "a much longer answer than that", "", "no"]
    rollout = answered(tiny_base, texts)
    source = source_of({"model": str(other_model), "batch_size": 3})
    assert source.name == "judge-1.5" and isinstance(source, SeparateModelReward)
    scores = source.score(rollout)
    plain = LlamaForSequenceClassification.from_pretrained(other_model, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = 0
    tokenizer = byte_tokenizer()
    for row, text in enumerate(texts):  # alone and unpadded, from the text of the whole conversation
        ids = tokenizer(f"[user]say {text}<|im_end|>\n[assistant]{text}<|im_end|>\n", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert_close(scores[row], plain(input_ids=ids).logits[0, 0], atol=2e-2, rtol=0)
    assert scores.dtype == torch.float32
    assert (scores - scores.bfloat16().float()).abs().max() > 0, "the head computes in fp32, though the model is in bfloat16"


def test_a_separate_model_loses_the_beginning_of_the_prompt_and_never_the_response(other_model, tiny_base):
    source = source_of({"model": str(other_model), "max_length": 24, "dtype": "float32"})
    rollout = answered(tiny_base, ["yes"], prompts=["word " * 50])
    (ids,) = [source._encode(prompt, text) for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)]
    assert len(ids) == 24 and source.base.tokenizer.decode(ids).endswith("d <|im_end|>\n[assistant]yes<|im_end|>\n"[-24:])
    with pytest.raises(InstructLiteError, match="does not fit its max_length 24; lower response_length"):
        source.score(answered(tiny_base, ["y" * 40]))


def test_a_separate_model_is_no_part_of_the_trainers_model(other_model, tiny_path, tmp_path):
    model = fresh(tiny_path)
    trainer = trainer_of(model, config(tmp_path / "out"), reward_model=["reward", f"hf:{other_model}"])
    others = {id(p) for p in trainer.rewards.objectives[1].members[0].base.model.parameters()}
    assert not others & {id(p) for p in trainer.model.parameters()}
    before = digest(trainer.rewards.objectives[1].members[0].base.model.float().parameters())
    trainer.train()
    assert "rewards/judge-1.5/mean" in trainer.state.log_history[0]
    assert digest(trainer.rewards.objectives[1].members[0].base.model.parameters()) == before


def test_a_model_without_a_trained_score_is_refused(tiny_path, tmp_path):
    with pytest.raises(InstructLiteError, match="no reward model with one score"):
        source_of({"model": str(tiny_path), "chat_template": "chatml"})
    with pytest.raises(InstructLiteError, match="temperature is no option"):
        source_of({"model": str(tiny_path), "temperature": 1.0})
    three = tmp_path / "three"
    LlamaForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(three)
    byte_tokenizer().save_pretrained(three)
    with pytest.raises(InstructLiteError, match="no reward model with one score"):
        source_of({"model": str(three), "chat_template": "chatml"})


# --- through the recipes ------------------------------------------------------------------------------------------------------

LOOP = {"dtype": "float32", "chat_template": "chatml"}
PPO = {"per_device_train_batch_size": 2, "num_mini_batches": 2, "num_ppo_epochs": 1, "max_steps": 4, "response_length": 6}
WORDS = ["yes", "no", "maybe", "so", "well", "oh"]
ROWS = [{"prompt": f"say {word}", "chosen": word + "!", "rejected": "?" * (n % 3 + 1)} for n, word in enumerate(WORDS)]


def reward_recipe(tiny_path, **changes) -> RewardRecipe:
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    options = {"model": str(tiny_path), "data": ROWS, "lora": Lora(r=4, alpha=8, top_layers=2), "seed": 5, "training": training, **LOOP}
    return RewardRecipe(**(options | changes))


@pytest.fixture(scope="module")
def three(tiny_path, tmp_path_factory) -> Adapter:
    return reward_recipe(tiny_path, ensemble=3).run(tmp_path_factory.mktemp("ensemble") / "reward")


def test_an_ensemble_is_three_runs_that_differ_in_their_seed_in_one_directory(three, tiny_path, tmp_path):
    members = three.members
    assert [member.path.name for member in members] == ["reward", "member-1", "member-2"]
    assert len({member.sha256 for member in members}) == 3
    assert members[2].sha256 == reward_recipe(tiny_path, seed=7).run(tmp_path / "alone").sha256
    assert json.loads((three.path / "run.json").read_text())["config"]["ensemble"] == 3
    assert not list(three.path.parent.glob("*.members"))
    ids = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    ours = RoleModel.load(load_base(tiny_path, **LOOP), {f"r{n}": member for n, member in enumerate(members)})
    scores = []
    for n, member in enumerate(members):  # plain PEFT loads each of them, the first one as the directory itself
        plain = AutoPeftModelForSequenceClassification.from_pretrained(member.path, num_labels=1, dtype=torch.float32)
        plain.config.pad_token_id = 0
        with torch.no_grad(), ours.active(f"r{n}"):
            scores.append(ours.scores(f"r{n}", ours.hidden(ids, torch.ones_like(ids))[:, -1]))
            assert_close(scores[-1], plain(input_ids=ids).logits[:, 0] + member.manifest.score_bias, atol=1e-5, rtol=0)
    assert not torch.allclose(scores[0], scores[1])


def test_a_member_that_was_changed_is_refused(three, tmp_path):
    shutil.copytree(three.path, tmp_path / "reward")
    (tmp_path / "reward" / "member-2" / "instructlite.json").write_text("{}")
    with pytest.raises(InstructLiteError, match="member-2/instructlite.json: missing or changed"):
        rewards_of(tmp_path / "reward")


def test_an_ensemble_that_goes_on_keeps_the_members_that_are_done(three, tiny_path, tmp_path, monkeypatch):
    seeds, kill = [], [7]
    plain = RankingTrainer.train

    def train(trainer, *args, **options):
        seeds.append(trainer.args.seed)
        if trainer.args.seed in kill:
            raise KeyboardInterrupt
        return plain(trainer, *args, **options)

    monkeypatch.setattr(RankingTrainer, "train", train)
    target = tmp_path / "reward"
    with pytest.raises(KeyboardInterrupt):
        reward_recipe(tiny_path, ensemble=3).run(target)
    assert sorted(path.name for path in (tmp_path / "reward.partial" / "members").iterdir()) == ["member-0", "member-1"]
    refused = {"head_learning_rate_scale +5.0 +2.0": {"head_learning_rate_scale": 2.0}, "data.comparisons": {"data": ROWS[:5]}}
    for row, changes in (refused | {"ensemble +3 +1": {"ensemble": 1}}).items():
        with pytest.raises(InstructLiteError, match=f"(?s)cannot be resumed.*\n  {row}"):
            reward_recipe(tiny_path, **({"ensemble": 3} | changes)).run(target, resume=True)
    seeds.clear()
    kill.clear()
    again = reward_recipe(tiny_path, ensemble=3).run(target, resume=True)
    assert seeds == [7] and [member.sha256 for member in again.members] == [member.sha256 for member in three.members]
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]
    reward_recipe(tiny_path, ensemble=3).run(target, resume=True)
    assert seeds == [7], "it is finished"
    reward_recipe(tiny_path, ensemble=2, data=ROWS[:5]).run(target, resume=True)
    assert seeds == [7, 5, 6], "other data, other members"


def test_an_ensemble_that_was_killed_while_it_was_put_together_goes_on(three, tiny_path, tmp_path, monkeypatch):
    """What kill -9 leaves there, and an exception does not: a directory that has begun to be filled."""

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", dies)
        with pytest.raises(KeyboardInterrupt):
            reward_recipe(tiny_path, ensemble=3).run(tmp_path / "reward")
    (tmp_path / "reward.partial" / "reward").mkdir()
    again = reward_recipe(tiny_path, ensemble=3).run(tmp_path / "reward", resume=True)
    assert [member.sha256 for member in again.members] == [member.sha256 for member in three.members]


def test_ppo_takes_an_ensemble_a_function_and_another_model_from_a_recipe(three, tiny_path, tmp_path, my_rewards, other_model):
    ppo = PPORecipe(
        model=str(tiny_path), reward=three, rewards=["my_rewards:brevity", {"model": str(other_model), "name": "judge"}],
        reward_weights={"brevity": 0.5, "judge": 0.1}, reward_combine="min", data=[{"prompt": row["prompt"]} for row in ROWS],
        lora=Lora(r=4, alpha=8, top_layers=2), training=PPO, **LOOP,
    ).run(tmp_path / "ppo")  # fmt: skip
    logs = [json.loads(line) for line in (ppo.path / "metrics.jsonl").read_text().splitlines()]
    for name in ("rewards/reward/mean", "rewards/reward-2/std", "reward/ensemble_std", "rewards/brevity/mean", "rewards/judge/std"):
        assert name in logs[0]
    assert ppo.manifest.parents == {f"reward-{n}": member.sha256 for n, member in enumerate(three.members)}
    noted = json.loads((ppo.path / "run.json").read_text())["config"]
    assert noted["rewards"] == ["my_rewards:brevity", {"model": str(other_model), "name": "judge"}] and noted["reward_combine"] == "min"


def test_the_value_function_starts_from_an_ensemble_only_where_it_can(three, tiny_path, tmp_path):
    prompts = [{"prompt": row["prompt"]} for row in ROWS]
    options = {"model": str(tiny_path), "reward": three, "data": prompts, "value_from": "reward", "training": PPO, **LOOP}
    options |= {"lora": Lora(r=4, alpha=8, top_layers=2)}
    assert PPORecipe(**options).run(tmp_path / "ppo").metrics["steps"] == 4
    with pytest.raises(InstructLiteError, match="use value_from=sft, a zero head"):
        PPORecipe(**options, reward_combine="min").run(tmp_path / "min")
    with pytest.raises(InstructLiteError, match="use value_from=sft, a zero head"):
        PPORecipe(**(options | {"reward": length})).run(tmp_path / "function")


def test_the_statistics_of_each_members_own_run_can_be_its_scale(three, tiny_path, tmp_path):
    rewards = rewards_of(three)
    rewards.prepare("reward_model", None)
    for scale, member in zip(rewards.objectives[0].scales, three.members, strict=True):
        assert (scale.mean, scale.std) == (member.metrics["score_mean"], member.metrics["score_std"])
    with pytest.raises(InstructLiteError, match="length has no score_mean and score_std; use first_rollout"):
        rewards_of([three, length]).prepare("reward_model", None)


def test_a_misspelt_function_is_found_before_anything_is_trained_and_prompts_keep_their_columns(my_rewards, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}", "level": n}) + "\n" for n in range(3)))
    given = ["ppo.rewards=['my_rewards:brevty']", f"data.prompts={tmp_path / 'prompts.jsonl'}"]
    with pytest.raises(InstructLiteError, match="my_rewards has no function brevty"):
        run_loop(load_loop("smollm2-135m", given), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    prepare_data(load_loop("smollm2-135m", given).data, tmp_path / "data")
    assert [row["level"] for row in read_records(tmp_path / "data" / "prompts.jsonl")] == [0, 1, 2]


def test_recipe_files_say_it_too(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: m\nreward: {ensemble: 3}\n"
        "ppo: {reward_combine: mean_minus_std, rewards: ['my:f', {model: other}], reward_weights: {reward: 0.7, f: 0.3}}\n"
    )
    loop = load_loop(path)
    assert loop.options("reward")["ensemble"] == 3
    assert "ensemble" not in loop.options("judge"), "one model judges"
    assert loop.options("ppo")["rewards"] == ["my:f", {"model": "other"}]
    for override, said in {
        "ppo.reward_combine=max": "must be mean | min | mean_minus_std", "reward.ensemble=0": "ensemble=0: at least 1",
        "ppo.reward_weights=1": "ppo.reward_weights must be",
    }.items():  # fmt: skip
        with pytest.raises(InstructLiteError, match=said.replace("|", r"\|")):
            RewardOptions(model="m", data="d", **load_loop(path, [override]).reward)
