"""The reward model: rankings the InstructGPT way (T-19), and the same scores in plain PEFT and in PPO's roles (T-20)."""

import itertools
import math
from statistics import fmean, pstdev

import pytest
import torch
from conftest import tiny_config
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from instructlite.config import Lora
from instructlite.data.records import read_records
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base
from instructlite.models.manifest import Adapter
from instructlite.models.roles import RoleModel
from instructlite.models.sampling import score
from instructlite.training import reward
from instructlite.training.reward import Collator, RewardRecipe, length_weight, right_pairs, wilson
from instructlite.training.sft import SFTRecipe

PAIRS = [{"prompt": f"Is {i} odd?", "chosen": "Yes" + "!" * (i % 4), "rejected": "No" + "?" * (i % 3)} for i in range(24)]
RANKINGS = [{"prompt": f"Say {i}.", "responses": ["one", "One!", "no", "never ever"], "ranks": [0, 0, 1, 2]} for i in range(8)]
DEMONSTRATIONS = [{"prompt": f"Is {i} odd?", "completion": "Yes, it is." + "." * (i % 6)} for i in range(12)]


def tiny_reward(tiny_path, **changes) -> RewardRecipe:
    training = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1} | changes.pop("training", {})
    options = {"model": str(tiny_path), "data": PAIRS, "dtype": "float32", "chat_template": "chatml", "lora": Lora(r=4, alpha=8)}
    return RewardRecipe(training=training, **(options | changes))


def tiny_sft(tiny_path, path) -> Adapter:
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in DEMONSTRATIONS]
    return SFTRecipe(
        model=str(tiny_path), data=rows, dtype="float32", chat_template="chatml", lora=Lora(r=4, alpha=8),
        training={"per_device_train_batch_size": 4, "learning_rate": 1e-2},
    ).run(path)  # fmt: skip


@pytest.fixture
def trainers(monkeypatch) -> list[reward.RankingTrainer]:
    """The trainers that recipes build during the test."""
    built = []

    class Kept(reward.RankingTrainer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            built.append(self)

    monkeypatch.setattr(reward, "RankingTrainer", Kept)
    return built


def base_of(tiny_path):
    return load_base(tiny_path, dtype="float32", chat_template="chatml")


def sequences(base, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    return [(base.encode_prompt(prompt), base.encode_completion(answer)) for prompt, answer in texts]


def roles_scores(tiny_path, adapter: Adapter, texts: list[tuple[str, str]]) -> torch.Tensor:
    base = base_of(tiny_path)
    return score(RoleModel.load(base, {"reward": adapter}), ["reward"], sequences(base, texts), batch_size=5)[0]


def plain_scores(model, base, rows: list[list[int]], left: bool) -> torch.Tensor:
    """Scores of a sequence classifier, as plain transformers gives them."""
    width = max(map(len, rows))
    pads = [[base.pad_id] * (width - len(row)) for row in rows]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(pad) for pad in pads]
    attention = torch.tensor([zero + one if left else one + zero for one, zero in zip(ones, zeros, strict=True)])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=attention).logits[:, 0]


TEXTS = [(row["prompt"], answer) for row in PAIRS[:6] for answer in (row["chosen"], row["rejected"])] + [("Say 1.", "never " * 9)]


# --- T-19: the loss and the bias ----------------------------------------------------------------------------------------


def loss_of(trainer, groups: list[dict]) -> tuple[float, torch.Tensor]:
    """The trainer's loss of one batch of groups, and the scores of all answers, one forward pass each."""
    batch = trainer.data_collator(groups)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), batch).item()
        alone = [torch.tensor([ids]) for group in groups for ids in group["responses_ids"]]
        scores = torch.cat([trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0] for ids in alone])
    return loss, scores


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_t19_the_loss_of_rankings_and_comparisons_is_that_of_all_their_pairs(tiny_path, tmp_path, trainers, center):
    tiny_reward(tiny_path, data=[*PAIRS, *RANKINGS], training={"max_steps": 3, "center_rewards_coefficient": center}).run(tmp_path / "r")
    (trainer,) = trainers
    groups = [row for row in trainer.train_dataset if len(row["ranks"]) == 4][:2] + list(trainer.train_dataset)[:3]
    loss, scores = loss_of(trainer, groups)
    brute, at = [], 0
    for group in groups:
        own, at = scores[at : at + len(group["ranks"])], at + len(group["ranks"])
        ranked = list(zip(own, group["ranks"], strict=True))
        pairs = [(a, b) for (a, rank_a), (b, rank_b) in itertools.product(ranked, ranked) if rank_a < rank_b]
        assert len(pairs) == {4: 5, 2: 1}[len(own)], "of the six pairs of four answers the tied one is none"
        brute.append(-fmean((logsigmoid(a - b) - center * (a + b) ** 2).item() for a, b in pairs))
    assert loss == pytest.approx(fmean(brute), abs=1e-6)


def test_t19_a_comparison_costs_minus_log_sigmoid_of_its_margin(tiny_path, tmp_path, trainers):
    tiny_reward(tiny_path, training={"max_steps": 3}).run(tmp_path / "r")
    loss, (chosen, rejected) = loss_of(trainers[0], [trainers[0].train_dataset[0]])
    assert loss == pytest.approx(-math.log(1 / (1 + math.exp(rejected - chosen))), abs=1e-6)


def test_t19_the_bias_puts_demonstrations_at_zero_and_moves_no_difference(tiny_path, tmp_path):
    adapter = tiny_reward(tiny_path, demonstrations=DEMONSTRATIONS).run(tmp_path / "r")
    shown = roles_scores(tiny_path, adapter, [(row["prompt"], row["completion"]) for row in DEMONSTRATIONS])
    assert abs(shown.mean().item()) < 1e-3
    assert abs(adapter.manifest.score_bias) > 0.01, "there must be something to shift for this to say anything"
    base = base_of(tiny_path)
    plain = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1, pad_token_id=0), adapter.path
    )
    unshifted = plain_scores(plain, base, [a + b for a, b in sequences(base, TEXTS)], left=False)
    shifted = roles_scores(tiny_path, adapter, TEXTS)
    torch.testing.assert_close(shifted - shifted[0], unshifted - unshifted[0], atol=1e-5, rtol=0)


def test_without_demonstrations_the_best_answers_score_zero(tiny_path, tmp_path):
    adapter = tiny_reward(tiny_path).run(tmp_path / "r")
    assert abs(roles_scores(tiny_path, adapter, [(row["prompt"], row["chosen"]) for row in PAIRS]).mean().item()) < 1e-3


# --- T-20: the same scores everywhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("from_sft", [False, True])
def test_t20_the_trained_model_plain_peft_and_the_role_model_give_the_same_scores(tiny_path, tmp_path, trainers, from_sft):
    model = tiny_sft(tiny_path, tmp_path / "sft") if from_sft else str(tiny_path)
    adapter = tiny_reward(tiny_path, model=model, data=[*PAIRS, *RANKINGS], demonstrations=DEMONSTRATIONS).run(tmp_path / "r")
    base = base_of(tiny_path)
    rows = [prompt + answer for prompt, answer in sequences(base, TEXTS)]
    trained = plain_scores(trainers[0].model, base, rows, left=False)
    assert trained.std() > 0.05
    for left in (False, True):
        auto = AutoPeftModelForSequenceClassification.from_pretrained(adapter.path, num_labels=1, pad_token_id=base.pad_id)
        torch.testing.assert_close(plain_scores(auto, base, rows, left), trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(roles_scores(tiny_path, adapter, TEXTS), trained + adapter.manifest.score_bias, atol=1e-5, rtol=0)


def test_t20_no_weight_is_missing_or_left_over(tiny_path, tmp_path):
    adapter = tiny_reward(tiny_path).run(tmp_path / "r")
    bare = AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=1, pad_token_id=0)
    plain = PeftModel.from_pretrained(bare, adapter.path)
    result = plain.load_adapter(adapter.path, "default")
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name or "score.modules_to_save" in name]
    stored = load_file(adapter.path / "adapter_model.safetensors")
    assert stored["base_model.model.score.weight"].dtype == torch.float32
    assert len(stored) == 3 * 7 * 2 + 1


def test_t20_the_score_is_read_at_the_end_token_though_the_tokenizer_came_with_pad_as_eos(tiny_path, tmp_path, trainers):
    tiny_reward(tiny_path, training={"max_steps": 2}).run(tmp_path / "r")
    model, base = trainers[0].model.eval(), base_of(tiny_path)
    assert model.config.pad_token_id == base.pad_id != base.end_id
    for row in trainers[0].train_dataset:
        assert all(ids[-1] == base.end_id for ids in row["responses_ids"])
    ids = torch.tensor([base.encode_prompt("Is 1 odd?") + base.encode_completion("Yes")])
    with torch.no_grad():
        hidden = model.base_model.model.model(ids).last_hidden_state[0]
        by_position = (hidden @ model.base_model.model.score.modules_to_save["default"].weight[0]).tolist()
    padded = plain_scores(model, base, [ids[0].tolist(), [5] * 40], left=False)[0].item()
    assert padded == pytest.approx(by_position[-1], abs=1e-5)
    assert abs(by_position[-1] - by_position[-2]) > 1e-3, "one token early would be another number"


def test_t20_an_adapter_of_another_base_is_refused(tiny_path, tmp_path):
    sft = tiny_sft(tiny_path, tmp_path / "sft")
    torch.manual_seed(1)
    tiny_path_other = tmp_path / "other"
    LlamaForCausalLM(tiny_config()).save_pretrained(tiny_path_other)
    manifest = sft.path / "instructlite.json"
    manifest.write_text(manifest.read_text().replace(str(tiny_path), str(tiny_path_other)))
    with pytest.raises(InstructLiteError, match="trained on another base"):
        tiny_reward(tiny_path, model=sft.path).run(tmp_path / "r")


# --- training -----------------------------------------------------------------------------------------------------------


def test_it_starts_from_the_sft_adapter_and_every_trainable_parameter_moves(tiny_path, tmp_path, trainers):
    sft = tiny_sft(tiny_path, tmp_path / "sft")
    still = tiny_reward(tiny_path, model=sft, lora=Lora(r=64), training={"learning_rate": 0.0, "max_steps": 1}).run(tmp_path / "still")
    stored, start = load_file(sft.path / "adapter_model.safetensors"), load_file(still.path / "adapter_model.safetensors")
    assert start.keys() - stored.keys() == {"base_model.model.score.weight"}
    assert all(torch.equal(tensor, start[name]) for name, tensor in stored.items())
    moved = load_file(tiny_reward(tiny_path, model=sft).run(tmp_path / "moved").path / "adapter_model.safetensors")
    assert [name for name in moved if torch.equal(moved[name], start[name])] == []
    assert still.manifest.parents == {"sft": sft.sha256}
    assert still.role == "reward"


def test_it_goes_on_from_a_reward_adapter_head_and_all(tiny_path, tmp_path):
    sft = tiny_sft(tiny_path, tmp_path / "sft")
    first = tiny_reward(tiny_path, model=sft).run(tmp_path / "first")
    still = tiny_reward(tiny_path, model=first, training={"learning_rate": 1e-12, "max_steps": 1}).run(tmp_path / "still")
    texts = [(row["prompt"], row["chosen"]) for row in PAIRS]
    before, after = roles_scores(tiny_path, first, texts), roles_scores(tiny_path, still, texts)
    assert (before - after).abs().max() < 1e-4
    assert still.manifest.parents == {"sft": sft.sha256, "reward": first.sha256}


def test_an_ensemble_goes_on_member_by_member(tiny_path, tmp_path):
    quick = {"max_steps": 1}
    first = tiny_reward(tiny_path, ensemble=2, training=quick).run(tmp_path / "first")
    second = tiny_reward(tiny_path, model=first, ensemble=2, training=quick).run(tmp_path / "second")
    parents = [member.manifest.parents["reward"] for member in second.members]
    assert parents == [member.sha256 for member in first.members]
    with pytest.raises(InstructLiteError, match=r"2 reward models, and ensemble=3; go on with as many \(ensemble=2\)"):
        tiny_reward(tiny_path, model=first, ensemble=3, training=quick).run(tmp_path / "third")


def test_the_head_starts_small_in_fp32_and_learns_faster(tiny_path, tmp_path, trainers):
    tiny_reward(tiny_path, dtype="bfloat16", head_learning_rate_scale=7.0, training={"weight_decay": 0.1}).run(tmp_path / "r")
    groups = trainers[0].optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx([3e-3, 3e-3, 2.1e-2])
    assert [len(group["params"]) for group in groups] == [3 * 7 * 2, 0, 1]
    head = groups[2]["params"][0]
    assert (head.dtype, tuple(head.shape)) == (torch.float32, (1, 32))
    assert groups[2]["weight_decay"] == 0.1
    torch.manual_seed(0)
    assert reward.ScalarHead(4095).weight.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_it_learns_and_reports_what_it_learnt(tiny_path, tmp_path):
    held_out = [{"prompt": f"Is {i} odd?", "chosen": "Yes!" * 3, "rejected": "No?"} for i in range(60, 70)]
    held_out += [{"prompt": "Say 99.", "responses": ["one", "One!", "never ever"], "ranks": [0, 0, 1]}]
    adapter = tiny_reward(
        tiny_path, data=[*PAIRS, *RANKINGS], eval_data=held_out, demonstrations=DEMONSTRATIONS, training={"num_train_epochs": 6}
    ).run(tmp_path / "r")
    texts = [
        (row["prompt"], answer)
        for row in held_out
        for answer in ((row["chosen"], row["rejected"]) if "chosen" in row else row["responses"])
    ]
    scores = roles_scores(tiny_path, adapter, texts).tolist()
    right = sum(a > b for a, b in zip(scores[0:20:2], scores[1:20:2], strict=True)) + sum(a > scores[22] for a in scores[20:22])
    metrics = adapter.metrics
    assert metrics["eval_pairs"] == 12
    assert metrics["eval_accuracy"] == pytest.approx(right / 12)
    assert metrics["eval_accuracy"] > 0.8
    assert (metrics["eval_accuracy_low"], metrics["eval_accuracy_high"]) == wilson(right, 12)
    assert metrics["eval_longer_wins"] == pytest.approx(10 / 12)
    lengths = [len(prompt) + len(answer) for prompt, answer in sequences(base_of(tiny_path), texts)]
    pairs = [(i, i + 1) for i in range(0, 20, 2)] + [(20, 21), (20, 22), (21, 22)]
    both_ways = torch.tensor([[scores[i] - scores[j], lengths[i] - lengths[j]] for a, b in pairs for i, j in ((a, b), (b, a))])
    assert metrics["eval_length_correlation"] == pytest.approx(torch.corrcoef(both_ways.T)[0, 1].item(), abs=1e-4)
    assert metrics["score_mean"] == pytest.approx(fmean(scores), abs=1e-4)
    assert metrics["score_std"] == pytest.approx(pstdev(scores), abs=1e-4)
    assert metrics["train_accuracy"] > 0.7
    assert metrics["score_bias"] == adapter.manifest.score_bias


def of_lengths(*pairs: tuple[int, int]) -> list[dict]:
    """Comparisons of a better and a worse answer with so many tokens."""
    return [{"responses_ids": [[1] * better, [1] * worse], "ranks": [0.0, 1.0]} for better, worse in pairs]


def test_the_weight_of_length_is_that_of_a_logistic_regression():
    """Of one slope and no intercept: three in four are won by the answer that is 4 tokens longer, so log 3 / 4 a token."""
    assert length_weight(of_lengths(*[(8, 4)] * 30, *[(4, 8)] * 10)) == pytest.approx(math.log(3) / 4, rel=0.02)
    assert length_weight(of_lengths((8, 4), (4, 8))) == pytest.approx(0, abs=1e-6)
    assert 0 < length_weight(of_lengths((8, 4), (9, 2))) < 5, "finite where the longer one always wins"
    assert length_weight(of_lengths((6, 6), (3, 3))) == 0


def test_what_length_explains_is_not_learnt_where_it_is_controlled(tiny_path, tmp_path):
    """Nothing but length tells these answers apart, and the longer one wins three times in four."""
    long, short = "a" * 9, "a" * 3
    rows = [{"prompt": f"Count {i}.", "chosen": long if i % 4 else short, "rejected": short if i % 4 else long} for i in range(48)]
    spread = {}
    for controlled in (True, False):
        options = dict(data=rows, eval_data=rows[:12], length_controlled=controlled, training={"num_train_epochs": 4})
        metrics = tiny_reward(tiny_path, **options).run(tmp_path / str(controlled)).metrics
        assert ("length_weight" in metrics) == controlled
        spread[controlled] = metrics["score_std"]
    assert spread[True] < spread[False] / 3


def test_answers_of_the_policy_tie_with_the_worst_and_are_kept(tiny_path, tmp_path, trainers):
    sft = tiny_sft(tiny_path, tmp_path / "sft")
    options = dict(model=sft, policy_samples=0.5, training={"max_steps": 1})
    first, again = (tiny_reward(tiny_path, **options).run(tmp_path / name) for name in ("first", "again"))
    kept = read_records(first.path / "policy_samples.jsonl", "rankings")
    assert len(kept) == first.metrics["policy_samples"] > 0
    assert all(row["ranks"][-1] == max(row["ranks"][:-1]) and len(set(row["responses"])) == len(row["ranks"]) for row in kept)
    ids = [row["responses_ids"] for row in trainers[0].train_dataset]
    assert sorted(map(len, ids))[-1] == max(len(row["ranks"]) for row in kept) > 2
    assert (again.path / "policy_samples.jsonl").read_bytes() == (first.path / "policy_samples.jsonl").read_bytes()
    other = tiny_reward(tiny_path, **options, seed=5).run(tmp_path / "other")
    assert (other.path / "policy_samples.jsonl").read_bytes() != (first.path / "policy_samples.jsonl").read_bytes()


def test_only_a_policy_gives_samples_and_only_a_share_of_the_prompts(tiny_path, tmp_path):
    with pytest.raises(InstructLiteError, match="nobody to sample from; pass the SFT adapter"):
        tiny_reward(tiny_path, policy_samples=0.5).run(tmp_path / "r")
    with pytest.raises(InstructLiteError, match="a share of the prompts, from 0 to 1"):
        tiny_reward(tiny_path, policy_samples=2)


def test_a_quantized_base_trains_a_reward_model_too(tiny_path, tmp_path, trainers):
    pytest.importorskip("bitsandbytes")
    adapter = tiny_reward(tiny_path, quantization="nf4", eval_data=PAIRS[:8], training={"num_train_epochs": 4}).run(tmp_path / "r")
    assert {p.dtype for p in trainers[0].model.parameters() if p.requires_grad} == {torch.float32}
    assert adapter.metrics["eval_accuracy"] > 0.7


def test_a_group_goes_whole_or_not_at_all(tiny_path, tmp_path, trainers, capsys):
    long = {"prompt": "Say 1.", "responses": ["one", "two", "three " * 60], "ranks": [0, 1, 2]}
    adapter = tiny_reward(tiny_path, data=[*PAIRS, long], training={"max_length": 120, "max_steps": 1}).run(tmp_path / "r")
    assert adapter.metrics["groups_too_long"] == 1
    assert len(trainers[0].train_dataset) == len(PAIRS)
    assert "left out 1 of 25 groups: longer than training.max_length=120" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_length": 20}}, r"all 24 groups .*max_length=20 .*95 %"),
        ({"data": [{"prompt": "a", "completion": "b"}]}, "neither a comparison nor a ranking"),
        ({"training": {"centre_rewards_coefficient": 0.01}}, "did you mean center_rewards_coefficient"),
    ],
)
def test_what_cannot_be_learnt_from_is_one_line(tiny_path, tmp_path, changes, message):
    with pytest.raises(InstructLiteError, match=message) as caught:
        tiny_reward(tiny_path, **changes).run(tmp_path / "r")
    assert "\n" not in str(caught.value)


def test_batches_hold_groups_of_similar_length(tiny_path, tmp_path, trainers):
    data = [{"prompt": "p" * (1 + 3 * (i % 16)), "chosen": "a", "rejected": "b"} for i in range(64)]
    tiny_reward(tiny_path, data=data, training={"max_steps": 1}).run(tmp_path / "r")
    trainer = trainers[0]
    widths = [batch["attention_mask"].sum(1) for batch in trainer.get_train_dataloader()]
    spread = fmean((width.max() - width.min()).item() for width in widths)
    assert spread < 15, "in random batches of four it is 27"


def test_the_collator_pads_right_and_numbers_the_groups():
    rows = [{"responses_ids": [[5, 6], [7]], "ranks": [0.0, 1.0]}, {"responses_ids": [[8, 9, 4], [3], [2]], "ranks": [1.0, 0.0, 1.0]}]
    batch = Collator(pad_id=1)(rows)
    assert batch["input_ids"][:, :3].tolist() == [[5, 6, 1], [7, 1, 1], [8, 9, 4], [3, 1, 1], [2, 1, 1]]
    assert batch["input_ids"].shape == (5, 8) and (batch["input_ids"][:, 3:] == 1).all()
    assert batch["attention_mask"].sum(1).tolist() == [2, 1, 3, 1, 1]
    assert batch["groups"].tolist() == [0, 0, 1, 1, 1]
    assert batch["ranks"].tolist() == [0, 1, 1, 0, 1]


def test_ties_are_no_pairs_and_equal_scores_are_half_right():
    groups = [{"ranks": [0, 0, 1]}, {"ranks": [1, 0]}]
    assert right_pairs([[3.0, 1.0, 1.0], [0.0, 2.0]], groups) == (2.5, 3)


def test_the_interval_is_wilsons():
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 5), (94, 136), (7, 7)):
        theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
