"""evaluate() on the tiny model: names keep to adapters, numbers agree with plain transformers and PEFT, and with a recount by hand."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from instructlite import evaluate
from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.evaluation.compare import Candidate, Comparison, Decoding
from instructlite.models.base import load_base, lora_config
from instructlite.models.manifest import Adapter, write_manifest
from instructlite.models.roles import RoleModel
from instructlite.models.sampling import Sampling

PROMPTS = [{"prompt": text} for text in ("Hi", "Why is the sky blue?", "Name a tree.", "How do I bake bread without an oven?", "Sing!")]
DEMONSTRATIONS = [
    {"prompt": "Hi", "completion": "Hello there."},
    {"prompt": "Name a tree.", "completion": "An oak."},
    {
        "prompt": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}],
        "completion": "Yes",
    },
]
FAST = {"max_new_tokens": 8, "samples": 2}


def make_adapter(base, directory, seed, *, reward=False, parents=None):
    """An adapter with random weights, a reward adapter with the head where TRL's RewardTrainer leaves it."""
    model = RoleModel.load(copy.deepcopy(base), {"policy": lora_config(Lora(r=4, alpha=8), base.model, "CAUSAL_LM")})
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.role_parameters("policy"):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    model.save_role("policy", directory, parents=parents)
    if reward:
        weights = load_file(directory / "adapter_model.safetensors")
        weights["base_model.model.score.weight"] = torch.randn(1, 32, generator=generator)
        save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        write_manifest(directory, role="reward", base=model.base, score_bias=0.5, parents=parents)
    return Adapter.load(directory)


@pytest.fixture(scope="module")
def runs(tiny_path, tmp_path_factory):
    """A directory with sft, ppo, and two reward adapters; PPO was trained on `reward`."""
    directory = tmp_path_factory.mktemp("runs")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    sft = make_adapter(base, directory / "sft", 1)
    reward = make_adapter(base, directory / "reward", 3, reward=True)
    judge = make_adapter(base, directory / "judge", 4, reward=True)
    make_adapter(base, directory / "ppo", 2, parents={"sft": sft.sha256, "reward": reward.sha256})
    metrics = {"eval_accuracy": 0.69, "eval_accuracy_low": 0.61, "eval_accuracy_high": 0.76, "eval_pairs": 136}
    (judge.path / "run.json").write_text(json.dumps({"metrics": metrics}))
    return directory


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    return evaluate(
        ["base", runs / "sft", runs / "ppo"], PROMPTS, {"judge": runs / "judge", "own": runs / "reward"},
        heldout_demonstrations=DEMONSTRATIONS, output_dir=tmp_path_factory.mktemp("report"), **FAST,
    )  # fmt: skip


def row(rows, **keys):
    found = [row for row in rows if all(row[name] == value for name, value in keys.items())]
    assert len(found) == 1, (keys, found)
    return found[0]


def texts(report, **keys):
    return [answer["text"] for entry in report.answers for answer in entry["answers"] if keys.items() <= answer.items()]


def plain_model(tiny_path, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)) if adapter else model


def prompt_ids(prompt):
    return byte_tokenizer().encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")


def plain_answer(model, prompt):
    """Greedy, as ids, of one prompt alone."""
    ids = prompt_ids(prompt)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0)
    return answer[0, ids.shape[1] :]


@pytest.mark.parametrize("name", ["base", "sft", "ppo"])
def test_greedy_answers_of_the_mixed_batch_are_those_of_plain_peft(report, runs, tiny_path, name):
    model = plain_model(tiny_path, None if name == "base" else runs / name)
    expected = [byte_tokenizer().decode(plain_answer(model, prompt["prompt"]), skip_special_tokens=True) for prompt in PROMPTS]
    assert texts(report, candidate=name, decoding="greedy") == expected
    assert len(set(expected)) > 1


def test_the_candidates_answer_differently(report):
    assert len({tuple(texts(report, candidate=name, decoding="greedy")) for name in ("base", "sft", "ppo")}) == 3


def test_win_rates_and_means_are_those_of_a_recount(report):
    for decoding, judge in [("sampled", "judge"), ("sampled", "own"), ("greedy", "judge"), ("greedy", "own")]:
        for a, b in [("sft", "base"), ("ppo", "base"), ("ppo", "sft")]:
            won = differences = 0.0
            for entry in report.answers:
                scores = {
                    name: [x["scores"][judge] for x in entry["answers"] if (x["candidate"], x["decoding"]) == (name, decoding)]
                    for name in (a, b)
                }
                pairs = [(x, y) for x in scores[a] for y in scores[b]]
                won += sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs) / len(pairs) / len(PROMPTS)
                differences += sum(x - y for x, y in pairs) / len(pairs) / len(PROMPTS)
            found = row(report.win_rates, a=a, b=b, judge=judge, decoding=decoding)
            assert found["rate"] == pytest.approx(won) and found["gain"] == pytest.approx(differences)
            assert found["low"] <= found["rate"] <= found["high"] and found["prompts"] == len(PROMPTS)
    assert {entry["rate"] for entry in report.win_rates} - {0.0, 0.5, 1.0}


@torch.no_grad()
def test_scores_are_those_of_the_plain_adapter_and_its_head_at_the_last_token(report, runs, tiny_path):
    sft, judge = plain_model(tiny_path, runs / "sft"), plain_model(tiny_path, runs / "judge")
    head = load_file(runs / "judge" / "adapter_model.safetensors")["base_model.model.score.weight"]
    for entry, prompt in zip(report.answers, PROMPTS, strict=True):
        ids = torch.cat([prompt_ids(prompt["prompt"])[0], plain_answer(sft, prompt["prompt"])])
        hidden = judge(ids[None], output_hidden_states=True).hidden_states[-1][0, -1]
        found = row(entry["answers"], candidate="sft", decoding="greedy")["scores"]["judge"]
        assert found == pytest.approx(float(head[0] @ hidden) + 0.5, abs=1e-4)  # 0.5: the manifest's score_bias


def test_the_perplexity_of_the_base_is_that_of_plain_transformers(report, tiny_path):
    model, tokenizer = plain_model(tiny_path), byte_tokenizer()
    loss = tokens = 0.0
    for demonstration in DEMONSTRATIONS:
        turns = (
            demonstration["prompt"] if isinstance(demonstration["prompt"], list) else [{"role": "user", "content": demonstration["prompt"]}]
        )
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"
        prompt, answer = tokenizer.encode(text), tokenizer.encode(demonstration["completion"] + "<|im_end|>")
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss += float(model(torch.tensor([prompt + answer]), labels=labels).loss) * len(answer)
        tokens += len(answer)
    by_name = {entry["name"]: entry["perplexity"] for entry in report.candidates}
    assert by_name["base"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert len(set(by_name.values())) == 3


def test_the_kl_of_one_token_answers_is_the_exact_one(runs, tiny_path):
    samples = 200
    run = evaluate([runs / "sft", runs / "ppo"], PROMPTS, runs / "judge", samples=samples, max_new_tokens=1, greedy=False, batch_size=500)
    sft, ppo = plain_model(tiny_path, runs / "sft"), plain_model(tiny_path, runs / "ppo")
    exact, variance = 0.0, 0.0
    for prompt in PROMPTS:
        with torch.no_grad():
            p, q = (model(prompt_ids(prompt["prompt"])).logits[0, -1].double().log_softmax(-1) for model in (ppo, sft))
        kl = float((p.exp() * (p - q)).sum())
        exact += kl / len(PROMPTS)
        variance += (float((p.exp() * (p - q) ** 2).sum()) - kl**2) / samples / len(PROMPTS) ** 2
    found = row(run.candidates, name="ppo")
    assert abs(found["kl"] - exact) < 4 * variance**0.5 < exact / 2
    assert found["kl_standard_error"] > 0


def test_names_keep_to_adapters_whatever_their_order(report, runs):
    other = evaluate([runs / "ppo", "base", runs / "sft"], PROMPTS, runs / "judge", **FAST)
    assert {e["name"]: e["adapter"] for e in other.candidates} == {e["name"]: e["adapter"] for e in report.candidates}
    for name in ("base", "sft", "ppo"):
        assert texts(other, candidate=name, decoding="greedy") == texts(report, candidate=name, decoding="greedy")
        ours, theirs = (row(r.rewards, candidate=name, judge="judge", decoding="greedy")["mean_reward"] for r in (report, other))
        assert ours == pytest.approx(theirs, abs=1e-6)
    forth = row(report.win_rates, a="ppo", b="sft", judge="judge", decoding="greedy")
    back = row(other.win_rates, a="sft", b="ppo", judge="judge", decoding="greedy")
    assert back["rate"] == pytest.approx(1 - forth["rate"]) and back["gain"] == pytest.approx(-forth["gain"]) and back["gain"] != 0


def test_swapped_directories_swap_the_verdict(report, runs, tmp_path):
    shutil.copytree(runs / "sft", tmp_path / "ppo")
    shutil.copytree(runs / "ppo", tmp_path / "sft")
    swapped = evaluate(["base", tmp_path / "sft", tmp_path / "ppo"], PROMPTS, runs / "judge", **FAST)
    honest, turned = (row(r.win_rates, a="ppo", b="sft", judge="judge", decoding="greedy") for r in (report, swapped))
    assert turned["gain"] == pytest.approx(-honest["gain"]) and turned["rate"] == pytest.approx(1 - honest["rate"])
    assert row(swapped.candidates, name="sft")["adapter"] == row(report.candidates, name="ppo")["adapter"]


def test_identical_candidates_are_an_exact_draw_at_no_distance(runs, tmp_path):
    shutil.copytree(runs / "sft", tmp_path / "twin")
    found = evaluate(
        [runs / "sft", tmp_path / "twin"], PROMPTS, runs / "judge", heldout_demonstrations=DEMONSTRATIONS, batch_size=3, **FAST
    )
    greedy = row(found.win_rates, decoding="greedy")
    assert [greedy[name] for name in ("rate", "low", "high", "gain", "gain_low", "gain_high")] == [0.5, 0.5, 0.5, 0, 0, 0]
    sft, twin = found.candidates
    assert (twin["kl"], twin["kl_standard_error"], twin["perplexity"]) == (0, 0, sft["perplexity"])
    assert texts(found, candidate="sft", decoding="sampled") != texts(found, candidate="twin", decoding="sampled"), "draws are their own"


def test_the_size_of_batches_changes_no_greedy_answer(report, runs):
    other = evaluate(["base", runs / "sft", runs / "ppo"], PROMPTS, runs / "judge", batch_size=2, **FAST)
    assert texts(other, decoding="greedy") == texts(report, decoding="greedy")


def test_the_same_seed_gives_the_same_report(report, runs):
    run = {"candidates": ["base", runs / "sft", runs / "ppo"], "data": PROMPTS, "judge": {"judge": runs / "judge", "own": runs / "reward"}}
    again, other = (evaluate(**run, heldout_demonstrations=DEMONSTRATIONS, seed=seed, **FAST) for seed in (0, 1))
    assert {**again.to_dict(), "seconds": None} == {**report.to_dict(), "seconds": None}
    assert texts(other, decoding="sampled") != texts(report, decoding="sampled")


def test_the_reference_is_the_first_adapter_and_the_base_has_no_kl(report):
    assert report.reference == "sft" and report.headline == ["ppo", "sft"]
    kl = {entry["name"]: entry["kl"] for entry in report.candidates}
    assert kl["base"] is None and kl["sft"] == 0 and kl["ppo"] > 0


def test_a_judge_that_trained_a_candidate_is_told_apart(report):
    judge, own = report.judges
    assert (judge["trained"], judge["not_trained"]) == ([], ["ppo"]) and (own["trained"], own["not_trained"]) == (["ppo"], [])
    assert (judge["accuracy"], judge["accuracy_low"], judge["pairs"], own["accuracy"]) == (0.69, 0.61, 136, None)


def test_prompts_are_different_short_enough_and_counted(runs):
    rows = [PROMPTS[1], {"prompt": "long " * 40}, PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[3]]
    found = evaluate([runs / "sft"], rows, runs / "judge", prompts=2, max_prompt_length=50, greedy=False, max_new_tokens=2)
    assert [entry["prompt"][0]["content"] for entry in found.answers] == [PROMPTS[1]["prompt"], PROMPTS[0]["prompt"]]
    assert {name: found.settings[name] for name in ("rows", "repeated", "too_long", "prompts")} == {
        "rows": 6, "repeated": 1, "too_long": 2, "prompts": 2,
    }  # fmt: skip


def test_prompts_beyond_the_context_are_left_out(runs):
    found = evaluate([runs / "sft"], [PROMPTS[0], {"prompt": "x" * 500}], runs / "judge", greedy=False, max_new_tokens=2)
    assert found.settings["too_long"] == 1


def test_the_shown_losses_are_the_worst(report):
    losses = [sample for sample in report.samples if sample["why"] == "loss"]
    assert losses and len({sample["prompt"] for sample in report.samples}) == len(report.samples) == len(PROMPTS)

    def difference(prompt, sample):
        scores = {
            x["candidate"]: x["scores"]["judge"]
            for x in report.answers[prompt]["answers"]
            if (x["decoding"], x["sample"]) == ("sampled", sample)
        }
        return scores["ppo"] - scores["sft"]

    worst = sorted(min(difference(prompt, sample) for sample in range(2)) for prompt in range(len(PROMPTS)))
    shown = [difference(sample["prompt"], sample["sample"]) for sample in losses]
    assert shown == worst[: len(shown)] and max(shown) < 0


def test_the_stop_token_counts_for_the_length_and_not_as_a_word(tiny_base):
    sft = Candidate("sft", None, None)
    comparison = Comparison(SimpleNamespace(base=tiny_base), [sft], [], [], 32, 0, {})
    ended, cut, stop = [50, 51, tiny_base.end_id], [50, 51, 52], [tiny_base.end_id]
    found = comparison._text(Decoding("sampled", Sampling(), 3, answers={"sft": [ended, cut, stop]}), sft)
    assert (found["length"], found["ended"], found["distinct_2"]) == pytest.approx((7 / 3, 2 / 3, 2 / 3))


def test_candidates_of_one_name_are_told_apart(runs, tmp_path):
    shutil.copytree(runs / "ppo", tmp_path / "sft")
    found = evaluate([runs / "sft", tmp_path / "sft"], PROMPTS, runs / "judge", greedy=False, max_new_tokens=2)
    assert [entry["name"] for entry in found.candidates] == ["sft", "sft-2"]


def test_names_that_torch_takes_for_itself_are_fine(runs, tmp_path):
    shutil.copytree(runs / "ppo", tmp_path / "train")
    shutil.copytree(runs / "judge", tmp_path / "v1.5")
    found = evaluate([runs / "sft", tmp_path / "train"], PROMPTS, tmp_path / "v1.5", greedy=False, max_new_tokens=2)
    assert found.candidates[1]["name"] == "train" and found.judges[0]["name"] == "v1.5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, "candidates: there are none"),
        ({"candidates": ["reward"]}, "a reward adapter cannot answer"),
        ({"judge": "sft"}, "a policy adapter cannot judge"),
        ({"temperature": 0}, "temperature=0"),
        ({"samples": 0}, "samples=0"),
        ({"max_prompt_length": 3}, "no prompt has at most 3 tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, change, message):
    arguments = {"candidates": ["sft"], "data": PROMPTS, "judge": "judge"} | change
    arguments["candidates"] = [runs / name for name in arguments["candidates"]]
    arguments["judge"] = runs / arguments["judge"]
    with pytest.raises(InstructLiteError, match=message):
        evaluate(**arguments)


def test_adapters_of_another_base_are_refused(runs, tiny_path, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny_path)
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    stranger = make_adapter(load_base(tmp_path / "base", dtype="float32", chat_template="chatml"), tmp_path / "stranger", 9)
    with pytest.raises(InstructLiteError, match="another base"):
        evaluate([runs / "sft", stranger], PROMPTS, runs / "judge")


def test_a_judge_without_finite_scores_is_refused(runs, tiny_path, tmp_path):
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    judge = make_adapter(base, tmp_path / "judge", 4, reward=True)
    weights = load_file(judge.path / "adapter_model.safetensors")
    weights["base_model.model.score.weight"][0, 0] = torch.nan
    save_file(weights, judge.path / "adapter_model.safetensors", metadata={"format": "pt"})
    write_manifest(judge.path, role="reward", base=base)
    with pytest.raises(InstructLiteError, match="not finite"):
        evaluate([runs / "sft"], PROMPTS, judge.path, greedy=False, max_new_tokens=2)
