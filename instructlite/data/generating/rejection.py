"""Rejection sampling: several answers to each prompt, of which the one with the highest reward becomes a demonstration.

As in WebGPT's best-of-n and Llama 2's rejection sampling; the reward is any function of (prompt, answer) pairs.
"""

from collections.abc import Callable

from ...errors import InstructLiteError
from .completer import Messages
from .synthetic import Asking, Generated, different_prompts

Score = Callable[[list[tuple[Messages, str]]], list[float]]


def rejection_sampling(
    asking: Asking, rows: list[dict], *, score: Score | None = None, n: int = 4, min_score: float | None = None
) -> Generated:
    """Demonstrations: the best of `n` answers to each prompt, if its score is at least `min_score`."""
    if score is None:
        raise InstructLiteError("rejection-sampling needs a reward adapter (--reward) or a scoring function")
    result = Generated(asking.method, "demonstrations")
    prompts = different_prompts(rows)
    drawn = asking.draws(result, prompts, n)
    scores = iter(score([(prompt, answer.text) for prompt, answers in zip(prompts, drawn, strict=True) for answer in answers]))
    for prompt, answers in zip(prompts, drawn, strict=True):
        scored = [(next(scores), answer) for answer in answers]
        if not scored:
            result.reject("no answer of any draw", prompt=prompt)
            continue
        best, answer = max(scored, key=lambda pair: pair[0])
        mean = sum(value for value, _ in scored) / len(scored)
        if min_score is not None and best < min_score:
            result.reject("best score too low", prompt=prompt, answer=answer.text, score=best)
            continue
        origin = asking.provenance(answer.created, score=best, mean_score=mean, n=len(scored))
        result.rows.append({"prompt": prompt, "completion": answer.text, "provenance": origin})
    kept = [row["provenance"] for row in result.rows]
    if kept:
        result.measured["gain_over_mean_score"] = sum(origin["score"] - origin["mean_score"] for origin in kept) / len(kept)
    return result
