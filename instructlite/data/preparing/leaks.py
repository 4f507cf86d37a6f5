"""Rows that give away an evaluation set, by n-grams as is usual.

An evaluation text leaks if half of its words lie in 8-grams that one text of the row has too (the rule of Tülu 3, Lambert et al. 2024).
Shorter texts have few 8-grams or none, and common words in a long text prove nothing: of them four fifths must lie in shared 4-grams
(below 8 words: all), in a text that is not much longer. Of fewer than 4 words only a copy counts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from .duplicates import words_of
from .steps import Sample, StepCount

LONG, SHORT = 8, 4
SHARE = 0.5
SHORT_SHARE = 0.8
SHORT_TEXT = 4
"""A text of at most this many times the words of a short evaluation text is compared with it by 4-grams."""


class EvaluationSet:
    """The n-grams of evaluation texts (prompts, and answers where there are any)."""

    def __init__(self, texts: Iterable[tuple[str, str]]):
        """texts: (where it stands, the text)."""
        self.places: list[str] = []
        self.sizes: list[int] = []
        self.whole: dict[tuple[str, ...], int] = {}
        self.grams: dict[int, dict[int, list[tuple[int, int]]]] = {LONG: defaultdict(list), SHORT: defaultdict(list)}
        for place, text in texts:
            words = words_of(text)
            number = len(self.places)
            self.places.append(place)
            self.sizes.append(len(words))
            self.whole.setdefault(tuple(words), number)
            for size in (LONG,) if len(words) >= 2 * LONG else (LONG, SHORT):
                for start, gram in _grams(words, size):
                    self.grams[size][gram].append((number, start))

    def leaked(self, text: str) -> str | None:
        """Place of the evaluation text that `text` gives away."""
        words = words_of(text)
        number = self.whole.get(tuple(words))
        if number is None:
            number = next(self._covered(words), None)
        return None if number is None else self.places[number]

    def _covered(self, words: list[str]) -> Iterator[int]:
        for size in (LONG, SHORT):
            covered: dict[int, set[int]] = defaultdict(set)
            for _, gram in _grams(words, size):
                for number, start in self.grams[size].get(gram, ()):
                    covered[number].update(range(start, start + size))
            for number, found in covered.items():
                least = SHARE if size == LONG else SHORT_SHARE if self.sizes[number] >= LONG else 1
                near = size == LONG or len(words) <= SHORT_TEXT * self.sizes[number]
                if near and len(found) >= least * self.sizes[number]:
                    yield number


def leaks(evaluation: EvaluationSet) -> Callable[[Sample, StepCount], str | None]:
    """A step that rejects rows one of whose turns or answers gives an evaluation text away."""

    def judge(sample: Sample, count: StepCount) -> str | None:
        texts = [turn["content"] for turn in sample.turns] or [sample.prompt]
        place = next(filter(None, map(evaluation.leaked, [*texts, *sample.answers])), None)
        return f"leaks an evaluation text: {place}" if place else None

    return judge


def evaluation_texts(rows: Iterable[Sample]) -> Iterable[tuple[str, str]]:
    """What must not leak from rows of any kind: the last turn of the prompt, and answers of at least LONG words, since a short
    answer ("Paris") is nobody's secret."""
    for sample in rows:
        yield sample.place, sample.turns[-1]["content"] if sample.turns else sample.prompt
        yield from ((sample.place, answer) for answer in sample.answers if len(answer.split()) >= LONG)


def _grams(words: list[str], size: int) -> Iterator[tuple[int, int]]:
    return ((start, hash(tuple(words[start : start + size]))) for start in range(len(words) - size + 1))
