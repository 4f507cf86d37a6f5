"""AI preferences (RLAIF: Lee et al. 2023): comparisons and rankings as a model prefers, asked in both orders (see pairwise.py)."""

import itertools

from .completer import Messages
from .pairwise import Pair, compare
from .synthetic import Asking, Generated, different_prompts


def ai_preferences(asking: Asking, rows: list[dict], *, answers: int = 2) -> Generated:
    """Comparisons (rankings where there are more than two answers) as the model prefers; ties are kept apart.

    Rows with answers of their own (comparisons, rankings) are judged as they are; to other prompts `answers` are written first.
    Where people's comparisons are judged, how often the model agrees with them is measured.
    """
    result = Generated(asking.method, "comparisons")
    groups = _groups(asking, result, rows, answers)
    pairs = [(i, j, k) for i, (_, texts) in enumerate(groups) for j, k in itertools.combinations(range(len(texts)), 2)]
    asked = [Pair(groups[i][0], groups[i][1][j], groups[i][1][k]) for i, j, k in pairs]
    verdicts = compare(asking.completions, asking.prompts, asked, max_tokens=asking.max_tokens, label=f"{asking.method}: both orders")
    outcomes: list[list[tuple[int, int, float | None]]] = [[] for _ in groups]
    created = [""] * len(groups)
    for (i, j, k), outcome, when in zip(pairs, verdicts.outcomes, verdicts.created, strict=True):
        outcomes[i].append((j, k, outcome))
        created[i] = max(created[i], when)
    if any(len(texts) > 2 for _, texts in groups):
        result.kind = "rankings"
    for (prompt, texts), found, when in zip(groups, outcomes, created, strict=True):
        _add(asking, result, prompt, texts, copeland(len(texts), found), when)
    result.measured = verdicts.measured()
    result.notes += verdicts.warnings()
    judged = [outcome for outcome in verdicts.outcomes if outcome is not None]
    if judged and all("chosen" in row for row in rows):
        result.measured["agrees_with_people"] = sum(judged) / len(judged)
    return result


def _groups(asking: Asking, result: Generated, rows: list[dict], answers: int) -> list[tuple[Messages, list[str]]]:
    """(prompt, answers): those of the row, chosen first, or new ones."""
    own = [row for row in rows if "responses" in row or "chosen" in row]
    groups = [(row["prompt"], row.get("responses") or [row["chosen"], row["rejected"]]) for row in own]
    prompts = different_prompts([row for row in rows if "responses" not in row and "chosen" not in row])
    for prompt, drawn in zip(prompts, asking.draws(result, prompts, answers), strict=True):
        if len(drawn) > 1:
            groups.append((prompt, [answer.text for answer in drawn]))
        else:
            result.reject("fewer than two answers", prompt=prompt)
    return groups


def copeland(answers: int, outcomes: list[tuple[int, int, float | None]]) -> list[int] | None:
    """Copeland's: by wins over the others, a tie half a win; the best 0. None if a verdict is missing."""
    wins = [0.0] * answers
    for j, k, outcome in outcomes:
        if outcome is None:
            return None
        wins[j] += outcome
        wins[k] += 1 - outcome
    order = sorted(set(wins), reverse=True)
    return [order.index(won) for won in wins]


def _add(asking: Asking, result: Generated, prompt: Messages, texts: list[str], ranks: list[int] | None, created: str) -> None:
    if ranks is None:
        return result.reject("no verdict", prompt=prompt, responses=texts)
    origin = {"provenance": asking.provenance(created)}
    if len(set(ranks)) == 1:
        result.ties.append({"prompt": prompt, "responses": texts, "ranks": ranks, **origin})
    elif result.kind == "comparisons":
        chosen, rejected = sorted(texts, key=lambda text: ranks[texts.index(text)])
        result.rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **origin})
    else:
        result.rows.append({"prompt": prompt, "responses": texts, "ranks": ranks, **origin})
    return None
