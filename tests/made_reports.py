"""Reports as evaluate writes them, with made-up numbers: a small one, and one in which every part is filled."""

from __future__ import annotations

import math
from typing import Any

from instructlite.evaluation.report import Report

# What the greedy control in a first prototype showed: a clear gain when sampled, three quarters of it sharpening.
SAMPLED = {"rate": 0.755, "low": 0.677, "high": 0.833, "gain": 0.445, "gain_low": 0.3, "gain_high": 0.59}
GREEDY = {"rate": 0.635, "low": 0.49, "high": 0.771, "gain": 0.121, "gain_low": -0.05, "gain_high": 0.3}
SHARPENING = {"a": "ppo", "b": "sft", "judge": "judge", "share": 0.744, "share_low": 0.4, "share_high": 0.98}


def candidate(name: str, **changes: Any) -> dict:
    row = {
        "name": name, "base": "tiny", "adapter": None if name == "base" else name * 8, "mean_reward": 0.1, "mean_reward_low": 0.0,
        "mean_reward_high": 0.2, "kl": None, "kl_standard_error": None, "perplexity": None, "length": 20.5, "ended": 0.98,
        "distinct_2": 0.8, "repeated_trigrams": 0.004,
    }  # fmt: skip
    return row | changes


def report(sampled=SAMPLED, greedy=GREEDY, sharpening=SHARPENING, text="An answer.", prompt="A question?", **changes: Any) -> Report:
    """Of sft and ppo, as format 1 had it: no row says more than it must."""
    pair = {"a": "ppo", "b": "sft", "judge": "judge", "prompts": 48}
    wins = [pair | {"decoding": "sampled"} | sampled] + ([pair | {"decoding": "greedy"} | greedy] if greedy else [])
    names = ("sft", "ppo")
    decodings = [row["decoding"] for row in wins]
    reward = {"judge": "judge", "mean_reward": 0.1, "mean_reward_low": 0.0, "mean_reward_high": 0.2}
    words = {"length": 20.5, "ended": 0.98, "distinct_2": 0.8, "repeated_trigrams": 0.004}
    answer = {"decoding": "sampled", "sample": 0, "text": text, "tokens": 5, "ended": True, "scores": {"judge": 0.25}}
    judge = {
        "name": "judge", "adapter": "j" * 8, "accuracy": 0.691, "accuracy_low": 0.609, "accuracy_high": 0.763, "pairs": 136,
        "longer_wins": 0.574, "trained": [], "not_trained": ["ppo"],
    }  # fmt: skip
    values = dict(
        base={"id": "tiny", "revision": None, "fingerprint": "f" * 8, "quantization": "none", "dtype": "float32"},
        settings={"prompts": 48, "samples": 2, "temperature": 1.0, "greedy": bool(greedy), "max_new_tokens": 48},
        reference="sft",
        headline=["ppo", "sft"],
        candidates=[
            candidate("sft", kl=0.0, kl_standard_error=0.0, perplexity=12.1),
            candidate("ppo", kl=4.97, kl_standard_error=0.3, perplexity=13.5),
        ],
        judges=[judge],
        win_rates=wins,
        rewards=[reward | {"candidate": name, "decoding": decoding} for decoding in decodings for name in names],
        texts=[words | {"candidate": name, "decoding": decoding} for decoding in decodings for name in names],
        sharpening=sharpening,
        samples=[{"prompt": 0, "sample": 0, "why": "loss"}],
        seconds={"load": 1.5},
        training=[],
        answers=[{"prompt": [{"role": "user", "content": prompt}], "answers": [answer | {"candidate": name} for name in names]}],
    )
    return Report(**(values | changes))


NAMES = ("base", "few-shot", "sft", "dpo", "best-of-4", "ppo-ptx", "ppo")


def full(
    names: tuple[str, ...] = NAMES, text: str = "An answer of some length, to see where it wraps.", prompt: str = "Why is the sky blue?"
) -> Report:
    """Seven candidates, two judges, every part. names: in the order of NAMES, so that other names can be tried."""
    base, few_shot, sft, dpo, best, ptx, ppo = names
    kinds = dict(zip(names, ("base", "few-shot", "adapter", "adapter", "best-of-n", "adapter", "adapter"), strict=True))
    stages = {sft: "sft", dpo: "dpo", ptx: "ppo", ppo: "ppo"}
    level = {name: 0.12 * i - 0.2 for i, name in enumerate(names)}
    distances = {sft: 0.0, dpo: 2.9, ptx: 3.7, ppo: 4.2}
    judges = ("judge", "reward")
    candidates = [
        candidate(
            name, kind=kinds[name], stage=stages.get(name), adapter=name * 8 if name in stages else None, mean_reward=level[name],
            mean_reward_low=level[name] - 0.1, mean_reward_high=level[name] + 0.1, kl=distances.get(name),
            kl_standard_error=0.2 if distances.get(name) else None, perplexity=12.0 + i, ended=0.3 + 0.1 * i,
            n=4 if name == best else None, analytic_kl=math.log(4) - 0.75 if name == best else None,
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    return report(
        candidates=candidates,
        headline=[ppo, sft],
        reference=sft,
        judges=_judges(ppo, ptx),
        win_rates=[*_wins(names, judges, level), _win(ppo, sft, "judge", "sampled", 0.04) | {"b_decoding": "greedy"}],
        rewards=[
            {"candidate": name, "judge": judge, "decoding": decoding, "mean_reward": level[name], "mean_reward_low": level[name] - 0.1,
             "mean_reward_high": level[name] + 0.1}
            for decoding in ("sampled", "greedy") for judge in judges for name in names
        ],
        texts=[
            {"candidate": name, "decoding": decoding, "length": 20.5, "ended": 0.9, "distinct_2": 0.8, "repeated_trigrams": 0.004}
            for decoding in ("sampled", "greedy") for name in names
        ],
        sharpening=SHARPENING | {"a": ppo, "b": sft},
        strengths=[
            {"judge": "judge", "decoding": "sampled", "candidate": name, "strength": 2 * level[name], "low": 2 * level[name] - 0.3,
             "high": 2 * level[name] + 0.3}
            for name in reversed(names)
        ],
        agreement={"judges": list(judges), "alpha": 0.31, "alpha_low": 0.22, "alpha_high": 0.4},
        ratings=[
            {"candidate": name, "judge": "judge", "scale": "pointwise_reference", "decoding": "sampled", "rating": 4.2, "rating_low": 3.9,
             "rating_high": 4.6, "missing": 3}
            for name in names
        ],
        side_effects=_side_effects(names),
        benchmarks=[
            {"candidate": name, "task": "truthfulqa_mc2", "metric": "acc", "value": 0.41 - 0.01 * i, "standard_error": 0.015, "n": 817,
             "how": "lm-eval 0.4.13"}
            for i, name in enumerate(names)
        ],
        costs=[{"candidate": ppo, "stage": "ppo", "seconds": 301.0, "peak_rss_mb": 1734.2, "tokens": 12000}],
        training=[course(ppo), course(ptx, pace=0.8, health={"kl_stop": "kl_stop in cycle 2: beyond kl_stop nats a sequence"})],
        samples=[{"prompt": 0, "sample": 0, "why": "loss"}, {"prompt": 1, "sample": 0, "why": "first"}],
        answers=[
            {"prompt": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}, {"role": "user", "content": prompt}],
             "answers": [{"candidate": name, "decoding": "sampled", "sample": 0, "text": text, "tokens": 5, "ended": i > 2,
                          "scores": {"judge": level[name]}} for i, name in enumerate(names)]}
            for _ in range(2)
        ],
    )  # fmt: skip


def course(name: str, health: dict | None = None, cycles: int = 12, pace: float = 1.0) -> dict:
    rise = [round(0.7 * pace * (1 - math.exp(-i / 4)), 3) for i in range(cycles)]
    curves = {
        "objective/score": rise, "watch/score": [round(0.4 * y - 0.004 * i * i, 3) for i, y in enumerate(rise)],
        "objective/kl": [round(0.4 * pace * i, 2) for i in range(cycles)], "objective/entropy": [2.8 - 0.1 * i for i in range(cycles)],
        "rollout/length_mean": [27.0 - i for i in range(cycles)], "rollout/eos_missing_frac": [0.2 - 0.01 * i for i in range(cycles)],
        "value/explained_variance": [0.04 * i for i in range(cycles)], "policy/loss": [-0.02] * cycles,
        "value/loss": [0.5 / (1 + i) for i in range(cycles)],
    }  # fmt: skip
    return {"candidate": name, "cycles": cycles, "curves": curves, "health": health or {}}


def _judges(ppo: str, ptx: str) -> list[dict]:
    accuracy = {"accuracy": 0.691, "accuracy_low": 0.609, "accuracy_high": 0.763, "pairs": 136, "longer_wins": 0.574}
    return [
        accuracy | {
            "name": "judge", "kind": "language model", "adapter": None, "trained": [], "not_trained": [ppo], "position_bias": 0.2,
            "position_bias_low": 0.1, "position_bias_high": 0.3, "same_in_both_orders": 0.7, "missing": 12,
            "warnings": ["position bias: in 40 of 90 pairs the judge took whichever answer stood first"],
        },
        accuracy | {"name": "reward", "kind": "reward", "adapter": "r" * 64, "trained": [ppo, ptx], "not_trained": []},
    ]  # fmt: skip


def _win(a: str, b: str, judge: str, decoding: str, difference: float) -> dict:
    rate = 0.5 + difference / 2
    return {
        "a": a, "b": b, "judge": judge, "decoding": decoding, "rate": rate, "low": rate - 0.07, "high": rate + 0.07, "prompts": 57,
        "gain": difference, "gain_low": difference - 0.1, "gain_high": difference + 0.1, "length_controlled": rate - 0.03,
        "length_controlled_low": rate - 0.12, "length_controlled_high": rate + 0.06, "p_of_a_draw": 0.012, "prompts_needed": 112,
        "warnings": [],
    }  # fmt: skip


def _wins(names: tuple[str, ...], judges: tuple[str, ...], level: dict[str, float]) -> list[dict]:
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    signs = {"judge": 1.0, "reward": 1.4}
    return [
        _win(a, b, judge, decoding, signs[judge] * (level[a] - level[b]))
        for decoding in ("sampled", "greedy") for judge in judges for a, b in sorted(pairs, key=lambda pair: pair != (names[-1], names[2]))
    ]  # fmt: skip


def _side_effects(names: tuple[str, ...]) -> list[dict]:
    measured = (
        ("red-team", "toxicity", "probability", "lower", 0.05), ("truthfulqa", "truthfulness", "share", "higher", 0.3),
        ("closed-domain", "hallucination", "share", "lower", 0.4), ("held-out", "customer_assistant", "share", "higher", 0.8),
        ("prose", "perplexity", None, "lower", 22.5), ("held-out", "length", "tokens", None, 28.0),
        ("held-out", "self_bleu", None, None, 0.13),
    )  # fmt: skip
    return [
        {"candidate": name, "decoding": "sampled", "set": prompts, "category": category, "measure": measure, "unit": unit, "better": better,
         "value": value * (1 + 0.04 * i), "value_low": value * (0.96 + 0.04 * i), "value_high": value * (1.04 + 0.04 * i), "n": 57}
        for category in (None, "brainstorming", "open_qa")
        for prompts, measure, unit, better, value in measured
        for i, name in enumerate(names)
        if category is None or prompts == "held-out"
    ]  # fmt: skip
