"""A voter that is no person: through the same store, with the same tickets and as blind as one in a browser.

What it votes by is a function from prompts and answers to ranks; a reward adapter, a Python function and a language model are made
into one here.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..data.generating.completer import Messages
from ..data.generating.pairwise import Pair
from ..data.generating.preferences import copeland
from ..errors import InstructLiteError, find_function
from .ballots import Ballot
from .store import Store

if TYPE_CHECKING:
    from ..evaluation.judges import LanguageModelJudge

Asked = Sequence[tuple[Messages, tuple[str, ...]]]
"""A prompt and its answers, several times."""
Ranking = Callable[[Asked], list[list[int] | None]]
"""Ranks of the answers, the lowest the best; None where it has nothing to say of them."""
Score = Callable[[list[tuple[Messages, str]]], list[float]]


def cast_votes(store: Store, name: str, items: Sequence[int], ranking: Ranking) -> tuple[int, int]:
    """Have the voter `name` judge those items that he has not judged yet; gives how many he judged, and of how many he said nothing."""
    voter = store.voter(name=name)
    left = {row.item for row in store.waiting(voter.key)}
    shown = [store.show(item, voter.key) for item in items if item in left]
    silent = 0
    for showing, ranks in zip(shown, ranking([(showing.prompt, showing.answers) for showing in shown]), strict=True):
        if ranks is None:
            silent += 1
        else:
            store.vote(showing.ticket, voter.key, Ballot(tuple(ranks)))
    return len(shown) - silent, silent


def by_score(score: Score) -> Ranking:
    """The higher score is the better answer; equal scores tie."""

    def ranking(asked: Asked) -> list[list[int] | None]:
        scores = iter(score([(prompt, answer) for prompt, answers in asked for answer in answers]))
        return [_ranks([next(scores) for _ in answers]) for _, answers in asked]

    return ranking


def by_function(path: str) -> Ranking:
    """A reward function with TRL's signature, named "module:function" and called with `prompts` and `completions`."""
    function = find_function("--judge", path)
    if function is None:
        raise InstructLiteError(f"--judge {path}: the module has no function of that name")

    def score(pairs: list[tuple[Messages, str]]) -> list[Any]:
        prompts, completions = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
        said = list(function(prompts=prompts, completions=completions))
        if len(said) != len(pairs) or not all(isinstance(number, (int, float)) and number == number for number in said):
            raise InstructLiteError(f"--judge {path}: must return one number for each of the {len(pairs)} answers")
        return said

    return by_score(score)


def by_language_model(judge: "LanguageModelJudge") -> Ranking:
    """All pairs of a prompt's answers in both orders; by wins, a tie half a win."""

    def ranking(asked: Asked) -> list[list[int] | None]:
        pairs = [(i, j, k) for i, (_, answers) in enumerate(asked) for j, k in itertools.combinations(range(len(answers)), 2)]
        verdicts = judge.compare([Pair(asked[i][0], asked[i][1][j], asked[i][1][k]) for i, j, k in pairs])
        found: list[list[tuple[int, int, float | None]]] = [[] for _ in asked]
        for (i, j, k), outcome in zip(pairs, verdicts.outcomes, strict=True):
            found[i].append((j, k, outcome))
        return [copeland(len(answers), outcomes) for (_, answers), outcomes in zip(asked, found, strict=True)]

    return ranking


def _ranks(scores: Sequence[float]) -> list[int]:
    best_first = sorted(set(scores), reverse=True)
    return [best_first.index(score) for score in scores]
