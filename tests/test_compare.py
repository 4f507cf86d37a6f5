"""evaluate() on the tiny model: names keep to adapters, numbers agree with plain transformers and PEFT, and with a recount by hand."""

import copy
import json
import math
import random
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer
from endpoints import Reply, stand_in
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from instructlite import evaluate
from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.evaluation import compare, kept
from instructlite.evaluation.compare import Comparison
from instructlite.evaluation.judges import language_model
from instructlite.evaluation.judging import Decoding
from instructlite.evaluation.report import Report
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
    """The row with these values; one of sampled answers against greedy ones only where it is asked for."""
    keys = {"b_decoding": None} | keys
    found = [row for row in rows if all(row.get(name) == value for name, value in keys.items())]
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
    for decoding in ("sampled", "greedy"):
        rate = row(found.win_rates, decoding=decoding)
        assert [rate[name] for name in ("rate", "low", "high", "gain", "gain_low", "gain_high")] == [0.5, 0.5, 0.5, 0, 0, 0]
    sft, twin = found.candidates
    assert (twin["kl"], twin["kl_standard_error"], twin["perplexity"]) == (0, 0, sft["perplexity"])
    assert texts(found, candidate="sft", decoding="sampled") == texts(found, candidate="twin", decoding="sampled")


def test_what_a_candidate_is_called_changes_no_answer(report, runs):
    renamed = evaluate({"one": "base", "two": runs / "sft", "three": runs / "ppo"}, PROMPTS, runs / "judge", **FAST)
    for name, other in zip(("base", "sft", "ppo"), ("one", "two", "three"), strict=True):
        assert texts(renamed, candidate=other) == texts(report, candidate=name)


def test_the_best_of_n_is_not_drawn_from_the_answers_that_it_meets(runs):
    found = evaluate(
        [runs / "sft", "best-of-2"], PROMPTS, runs / "judge", reward=runs / "reward", samples=2, max_new_tokens=8, greedy=False
    )
    plain, best = (texts(found, candidate=name) for name in ("sft", "best-of-2"))
    assert not set(plain) & set(best)


def test_answers_to_one_prompt_are_drawn_apart(report):
    sampled = texts(report, candidate="ppo", decoding="sampled")
    assert all(first != second for first, second in zip(sampled[::2], sampled[1::2], strict=True))


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
    comparison = Comparison(SimpleNamespace(model=SimpleNamespace(base=tiny_base)), [], [], None, [], None, 0, {})
    ended, cut, stop = [50, 51, tiny_base.end_id], [50, 51, 52], [tiny_base.end_id]
    found = comparison._text(Decoding("sampled", Sampling(), 3, answers={"sft": [ended, cut, stop]}), "sft")
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


# --- other candidates than adapters -----------------------------------------------------------------------------------------


SHOTS = [{"prompt": f"Say {word}.", "completion": word} for word in ("one", "two", "three", "four")]


@pytest.fixture(scope="module")
def wide(runs, tmp_path_factory):
    """Everybody, in one report."""
    return evaluate(
        ["base", "few-shot:2", "context", runs / "sft", "best-of-4", runs / "ppo"],
        [row | ({"context": "Oaks are trees."} if "tree" in row["prompt"] else {}) for row in PROMPTS],
        {"judge": runs / "judge", "both": [runs / "judge", runs / "reward"]},
        demonstrations=SHOTS, reward=runs / "reward", heldout_demonstrations=DEMONSTRATIONS,
        output_dir=tmp_path_factory.mktemp("wide"), **FAST,
    )  # fmt: skip


def test_every_kind_of_candidate_has_its_row_in_the_given_order(wide):
    found = [(entry["name"], entry["kind"], entry["n"], entry["of"]) for entry in wide.candidates]
    assert found == [
        ("base", "base", None, None),
        ("few-shot:2", "few-shot", 2, None),
        ("context", "context", None, None),
        ("sft", "adapter", None, None),
        ("best-of-4", "best-of-n", 4, "sft"),
        ("ppo", "adapter", None, None),
    ]
    best = row(wide.candidates, name="best-of-4")
    assert best["analytic_kl"] == pytest.approx(math.log(4) - 3 / 4) and best["adapter"] == row(wide.candidates, name="sft")["adapter"]
    assert wide.headline == ["ppo", "sft"] and wide.reference == "sft"


def test_few_shot_answers_what_the_base_answers_after_the_demonstrations(wide, tiny_path):
    model, tokenizer = plain_model(tiny_path), byte_tokenizer()
    order = random.Random(0).sample(SHOTS, len(SHOTS))[:2]
    shown = "".join(f"<|im_start|>user\n{s['prompt']}<|im_end|>\n<|im_start|>assistant\n{s['completion']}<|im_end|>\n" for s in order)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(f"{shown}<|im_start|>user\n{prompt['prompt']}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0)
        expected.append(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
    assert texts(wide, candidate="few-shot:2", decoding="greedy") == expected
    assert texts(wide, candidate="base", decoding="greedy") != expected


def test_the_best_of_n_is_what_the_training_reward_model_scores_highest(wide, runs, monkeypatch):
    monkeypatch.setattr(compare, "Asked", lambda name, role, prompt, number, draws: kept.Asked(name, role, prompt, number, 4))
    all_drawn = evaluate([runs / "sft"], PROMPTS, runs / "reward", samples=8, max_new_tokens=8, greedy=False)
    best = []
    for entry in all_drawn.answers:
        answers = entry["answers"]
        for part in (answers[:4], answers[4:]):
            best.append(max(part, key=lambda answer: answer["scores"]["reward"])["text"])
    assert texts(wide, candidate="best-of-4", decoding="sampled") == best
    assert not texts(wide, candidate="best-of-4", decoding="greedy"), "the best of equal answers is none"
    by_judge = [row(wide.rewards, candidate=name, judge="judge", decoding="sampled")["mean_reward"] for name in ("sft", "best-of-4")]
    assert by_judge[0] != by_judge[1]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (["sft", "best-of-4"], "the best by which reward model"),
        (["base", "few-shot:4"], "few-shot:4: give demonstrations="),
        (["best-of-4"], "an adapter is not among the candidates that it can draw from: none"),
        (["sft", "best-of-2:ppo"], "ppo is not among the candidates that it can draw from: sft"),
        (["few-shot:0"], "is written few-shot:4"),
    ],
)
def test_a_candidate_that_lacks_what_it_needs_says_so(runs, candidates, message):
    named = [str(runs / name) if name in ("sft", "ppo") else name for name in candidates]
    with pytest.raises(InstructLiteError, match=message):
        evaluate(named, PROMPTS, runs / "judge")


# --- kept -------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As kill -9: nothing may be caught and tidied up."""


@pytest.fixture
def computed(monkeypatch):
    """Counts what is drawn, scored and run for log-probabilities; `killed_after` batches of answers everything stops."""
    counts = Counter()

    def counting(name, function):
        def call(model, first, *rest, **options):
            rows = first if name == "generate" else rest[0]
            counts[name] += len(rows)
            if name == "generate" and counts["killed_after"]:
                keep, left = options["keep"], iter(range(counts["killed_after"] - 1, -1, -1))

                def keep_some(numbers, answers):
                    keep(numbers, answers)
                    if next(left) == 0:
                        raise Killed

                options["keep"] = keep_some
            return function(model, first, *rest, **options)

        return call

    for name in ("generate", "score", "log_probs"):
        monkeypatch.setattr(kept, name, counting(name, getattr(kept, name)))
    return counts


def test_an_interrupted_evaluation_goes_on_and_ends_as_the_uninterrupted_one(report, runs, computed, tmp_path):
    run = {"candidates": ["base", runs / "sft", runs / "ppo"], "data": PROMPTS, "judge": {"judge": runs / "judge", "own": runs / "reward"}}
    run |= {"heldout_demonstrations": DEMONSTRATIONS, "output_dir": tmp_path, **FAST}
    whole = evaluate(**run | {"output_dir": tmp_path / "whole", "batch_size": 4})
    drawn = computed["generate"]
    for batches in (1, 3):
        computed["killed_after"] = batches
        with pytest.raises(Killed):
            evaluate(**run, batch_size=4)
    computed.clear()
    again = evaluate(**run, batch_size=4)
    assert computed["generate"] == drawn - 16, "four batches of four were kept"
    assert {**again.to_dict(), "seconds": None} == {**whole.to_dict(), "seconds": None}
    assert again.answers == whole.answers
    computed.clear()
    evaluate(**run, batch_size=4)
    assert not computed, "all of it is kept"


def test_one_more_candidate_or_judge_costs_only_itself(report, runs, computed, tmp_path):
    first = evaluate(["base", runs / "sft"], PROMPTS, runs / "judge", output_dir=tmp_path, **FAST)
    computed.clear()
    second = evaluate(["base", runs / "sft", runs / "ppo"], PROMPTS, runs / "judge", output_dir=tmp_path, **FAST)
    assert computed["generate"] == 3 * len(PROMPTS), "two sampled answers and a greedy one"
    for name in ("base", "sft"):
        assert texts(second, candidate=name) == texts(first, candidate=name)
    assert texts(second) == texts(report), "whatever was there before"
    computed.clear()
    third = evaluate(["base", runs / "sft", runs / "ppo"], PROMPTS, [runs / "judge", runs / "reward"], output_dir=tmp_path, **FAST)
    assert not computed["generate"] and computed["score"]
    assert texts(third) == texts(second)


def test_another_seed_adapter_or_length_is_drawn_anew(runs, computed, tmp_path):
    run = {"data": PROMPTS, "judge": runs / "judge", "output_dir": tmp_path / "report", "greedy": False}
    shutil.copytree(runs / "sft", tmp_path / "mine")
    evaluate([tmp_path / "mine"], **run, max_new_tokens=4)
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(runs / "ppo", tmp_path / "mine")
    for options in (
        {"max_new_tokens": 4},
        {"max_new_tokens": 4, "seed": 1},
        {"max_new_tokens": 5},
        {"max_new_tokens": 4, "temperature": 0.5},
    ):
        computed.clear()
        evaluate([tmp_path / "mine"], **run, **options)
        assert computed["generate"] == 2 * len(PROMPTS)


def test_a_merged_model_answers_as_its_adapter_and_is_judged_beside_it(runs, tiny_path, tmp_path):
    plain_model(tiny_path, runs / "ppo").merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = load_base(tiny_path, chat_template="chatml").tokenizer.chat_template
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "merged")
    found = evaluate(
        [runs / "sft", runs / "ppo", tmp_path / "merged"], PROMPTS, runs / "judge", heldout_demonstrations=DEMONSTRATIONS, **FAST
    )
    assert row(found.candidates, name="merged")["kind"] == "merged"
    assert texts(found, candidate="merged", decoding="greedy") == texts(found, candidate="ppo", decoding="greedy")
    ppo, merged = (row(found.candidates, name=name) for name in ("ppo", "merged"))
    assert merged["perplexity"] == pytest.approx(ppo["perplexity"], rel=1e-3) and merged["kl"] > 0
    (tmp_path / "merged" / "chat_template.jinja").write_text(tokenizer.chat_template + " ")
    with pytest.raises(InstructLiteError, match="merged: its template is not that of"):
        evaluate([runs / "sft", tmp_path / "merged"], PROMPTS, runs / "judge", **FAST)


# --- judges that are asked --------------------------------------------------------------------------------------------------


COMPARISONS = [{"prompt": f"Ask {i}", "chosen": "good" if i % 4 else "bad", "rejected": "bad" if i % 4 else "good"} for i in range(12)]


def test_a_language_model_at_an_endpoint_judges_and_is_judged_and_is_asked_once(runs, computed, tmp_path):
    def prefers_good(prompt, before):
        if "User: Sing!" in prompt:
            return Reply(b"", status=500)  # never any better
        if before == 0 and "User: Hi" in prompt:
            return Reply(b"{")  # better the second time
        a, b = (re.search(rf"\[Answer {place}\]\n(.*?)\n?\[End of", prompt, re.DOTALL)[1] for place in "AB")
        return f"[[{'A' if a > b else 'B'}]]"  # 'good' > 'bad'

    run = {"candidates": ["base", runs / "sft"], "data": PROMPTS, "comparisons": COMPARISONS, "output_dir": tmp_path, **FAST}
    with stand_in(prefers_good) as server:
        ask = lambda: language_model(f"llm:m@{server.url}", tmp_path / "verdicts.sqlite", retries=1)  # noqa: E731
        found = evaluate(**run, judge=[runs / "reward", ask()])
        asked = len(server.asked)
        again = evaluate(**run, judge=[runs / "reward", ask()])
        assert all("Sing!" in prompt for prompt in server.prompts[asked:]), "what came is kept, what did not come is asked again"
    named = row(found.judges, name="m")
    assert (named["kind"], named["adapter"], named["accuracy"], named["pairs"]) == ("language model", None, 0.75, 12)
    assert named["accuracy_low"] < 0.75 < named["accuracy_high"] and named["missing"] == 3
    win = row(found.win_rates, judge="m", decoding="sampled")
    assert (win["prompts"], win["missing"], win["gain"]) == (4, 2, None)
    assert again.win_rates == found.win_rates
    measured = row(found.judges, name="reward")["accuracy"]
    assert 0 <= measured <= 1, "a reward model without an accuracy of its own is judged on the same comparisons"
    assert Report.load(tmp_path).judges == found.judges


def test_a_language_model_in_memory_that_says_nothing_usable_wins_nobody_anything(runs, tmp_path):
    found = evaluate(["base", runs / "sft"], PROMPTS[:1], [f"llm:{runs / 'ppo'}"], greedy=False, output_dir=tmp_path, max_new_tokens=4)
    (win,) = found.win_rates
    assert (win["judge"], win["rate"], win["missing"], win["gain"]) == ("ppo", None, 2, None)
    assert found.strengths == [] and found.agreement is None and (found.rewards, found.sharpening) == ([], None)
    assert row(found.candidates, name="sft")["mean_reward"] is None


def test_an_ensemble_judges_by_the_mean_of_its_members(wide):
    for entry in wide.answers:
        scores = [answer["scores"] for answer in entry["answers"]]
        assert len({found["both"] for found in scores}) > 1
    assert row(wide.judges, name="both")["kind"] == "ensemble" and row(wide.judges, name="judge")["kind"] == "reward"
    assert row(wide.judges, name="both")["trained"] == ["best-of-4", "ppo"], "one of its members did, or chose the answers"
    assert row(wide.judges, name="judge")["not_trained"] == ["best-of-4", "ppo"]
