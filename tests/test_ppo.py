"""The loop SFT -> reward model -> PPO through the recipes, on the tiny model, plain and quantized."""

import hashlib
import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM

from instructlite import PPORecipe, RewardRecipe, SFTRecipe
from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base
from instructlite.models.manifest import Adapter
from instructlite.models.roles import RoleModel

DEMONSTRATIONS = [{"prompt": f"say {word}", "completion": f"{word}!"} for word in ("yes", "no", "maybe", "so", "well", "oh", "ah", "eh")]
COMPARISONS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "?" * (n % 3 + 1)} for n, row in enumerate(DEMONSTRATIONS)
]
PROMPTS = [{"prompt": row["prompt"]} for row in DEMONSTRATIONS]
LORA = Lora(r=4, alpha=8, top_layers=2)
PPO = {
    "per_device_train_batch_size": 2,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "max_steps": 8,
    "response_length": 8,
    "learning_rate": 1e-3,
}


def loop(base, directory, **options) -> dict[str, Adapter]:
    common = dict(seed=1, training={"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3})
    options = {"dtype": "float32", "chat_template": "chatml"} | options
    sft = SFTRecipe(model=str(base), data=DEMONSTRATIONS, lora=LORA, **common, **options).run(directory / "sft")
    reward = RewardRecipe(model=sft, data=COMPARISONS, eval_data=COMPARISONS[:4], demonstrations=DEMONSTRATIONS, **common).run(
        directory / "reward"
    )
    ppo = PPORecipe(model=sft, reward=reward, data=PROMPTS, seed=1, training=PPO).run(directory / "ppo")
    return {"sft": sft, "reward": reward, "ppo": ppo}


def weights_hash(base) -> str:
    return hashlib.sha256(b"".join(p.detach().view(torch.uint8).numpy().tobytes() for p in base.model.parameters())).hexdigest()


@pytest.fixture(scope="module", params=["none", "nf4"])
def run(request, tiny_path, tmp_path_factory):
    directory = tmp_path_factory.mktemp(f"loop-{request.param}")
    return loop(tiny_path, directory, quantization=request.param), request.param


def test_every_stage_leaves_an_adapter_of_the_same_base(run, tiny_path):
    adapters, quantization = run
    assert [adapter.role for adapter in adapters.values()] == ["policy", "reward", "policy"]
    assert {adapter.base_id for adapter in adapters.values()} == {str(tiny_path)}
    assert {adapter.manifest.quantization for adapter in adapters.values()} == {quantization}
    assert adapters["ppo"].manifest.parents == {"sft": adapters["sft"].sha256, "reward": adapters["reward"].sha256}
    assert sorted(path.name for path in adapters["ppo"].path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "instructlite.json", "metrics.jsonl", "run.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_ppo_moved_the_policy_and_says_how_far(run):
    adapters, _ = run
    assert adapters["ppo"].sha256 != adapters["sft"].sha256
    metrics = adapters["ppo"].metrics
    assert metrics["first"]["objective/kl"] == 0 and metrics["steps"] == 8 and metrics["episodes"] == 8


def test_plain_peft_gives_the_logits_and_scores_of_the_roles(run, tiny_path):
    adapters, quantization = run
    if quantization != "none":
        pytest.skip("the plain load below is not quantized")
    ids = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    model = RoleModel.load(load_base(tiny_path, dtype="float32", chat_template="chatml"), adapters)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32), str(adapters["ppo"].path))
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(adapters["reward"].path, num_labels=1, dtype=torch.float32)
    scorer.config.pad_token_id = 0
    with torch.no_grad():
        with model.active("ppo"):
            assert torch.equal(model.logits(model.hidden(ids, torch.ones_like(ids))), plain(input_ids=ids).logits)
        with model.active("reward"):
            ours = model.scores("reward", model.hidden(ids, torch.ones_like(ids))[:, -1])
        theirs = scorer(input_ids=ids).logits[:, 0] + adapters["reward"].manifest.score_bias
    assert (ours - theirs).abs().max() < 1e-5


def test_the_quantized_base_keeps_every_byte_through_ppo(run, tiny_path, monkeypatch, tmp_path):
    adapters, quantization = run
    seen = []
    original = RoleModel.for_ppo.__func__

    def remember(cls, base, *args, **kwargs):
        seen.append((base, weights_hash(base)))
        return original(cls, base, *args, **kwargs)

    monkeypatch.setattr(RoleModel, "for_ppo", classmethod(remember))
    PPORecipe(model=adapters["sft"], reward=adapters["reward"], data=PROMPTS, value_from="reward", training=PPO).run(tmp_path / "again")
    (base, before) = seen[0]
    after = hashlib.sha256(
        b"".join(p.detach().view(torch.uint8).numpy().tobytes() for n, p in base.model.named_parameters() if "lora_" not in n)
    ).hexdigest()
    assert after == before


def test_the_same_seed_gives_the_same_adapters(tiny_path, tmp_path, run):
    adapters, quantization = run
    again = loop(tiny_path, tmp_path, quantization=quantization)
    assert {name: adapter.sha256 for name, adapter in again.items()} == {name: adapter.sha256 for name, adapter in adapters.items()}


def test_ptx_is_on_where_there_are_texts_for_it(run, tmp_path):
    adapters, quantization = run
    if quantization != "none":
        pytest.skip("one kind is enough")
    options = dict(model=adapters["sft"], reward=adapters["reward"], data=PROMPTS, seed=1)
    texts = [{"text": f"once upon a time there was a {word}"} for word in ("king", "queen", "cat", "mouse")]
    training = PPO | {"max_steps": 4}
    plain = PPORecipe(**options, training=training).run(tmp_path / "plain")
    ptx = PPORecipe(**options, training=training, ptx_data=texts).run(tmp_path / "ptx")
    strong = PPORecipe(**options, training=training, ptx_data=texts, ptx_coef=1.0).run(tmp_path / "strong")
    losses = [json.loads((adapter.path / "metrics.jsonl").read_text().splitlines()[3]).get("ptx/loss") for adapter in (plain, ptx, strong)]
    assert losses[0] is None and losses[1] > losses[2], "the stronger, the likelier the texts"
    written = json.loads((ptx.path / "run.json").read_text())
    assert written["config"]["training"]["ptx_coef"] == 0.1 and written["data"]["ptx"]["rows"] == 4
    with pytest.raises(InstructLiteError, match="ptx_coef=0.5 without ptx_data"):
        PPORecipe(**options, ptx_coef=0.5)


def test_a_policy_in_place_of_the_reward_model_is_refused(run, tmp_path):
    adapters, _ = run
    with pytest.raises(InstructLiteError, match="PPO needs the directory that RewardRecipe wrote"):
        PPORecipe(model=adapters["sft"], reward=adapters["sft"], data=PROMPTS, training=PPO).run(tmp_path / "ppo")


def test_ppo_from_a_bare_base_is_held_to_the_base(run, tiny_path, tmp_path):
    adapters, quantization = run
    if quantization != "none":
        pytest.skip("one kind is enough")
    options = {"dtype": "float32", "chat_template": "chatml"}
    reward = RewardRecipe(model=str(tiny_path), data=COMPARISONS, lora=LORA, training={"max_steps": 1}, **options).run(tmp_path / "reward")
    ppo = PPORecipe(model=str(tiny_path), reward=reward, data=PROMPTS, lora=LORA, training=PPO, **options).run(tmp_path / "ppo")
    assert ppo.metrics["first"]["objective/kl"] == 0 and ppo.manifest.parents == {"reward": reward.sha256}


def test_it_goes_on_from_a_policy_and_is_held_to_another(run, tmp_path):
    adapters, quantization = run
    if quantization != "none":
        pytest.skip("one kind is enough")
    options = dict(model=adapters["ppo"], reward=adapters["reward"], data=PROMPTS, seed=2)
    ppo = PPORecipe(**options, reference=adapters["sft"], training=PPO).run(tmp_path / "ppo")
    assert ppo.metrics["first"]["objective/kl"] != 0, "it starts where the last one had come to"
    assert ppo.manifest.parents == {"sft": adapters["sft"].sha256, "policy": adapters["ppo"].sha256, "reward": adapters["reward"].sha256}
    with pytest.raises(InstructLiteError, match="a reward adapter; PPO is held to a policy"):
        PPORecipe(**options, reference=adapters["reward"], training=PPO).run(tmp_path / "wrong")
