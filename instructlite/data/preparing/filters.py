"""The plain steps: normalise the text, then keep to lengths, a language and a limit of toxicity."""

import unicodedata
from collections.abc import Callable, Sequence

from ...errors import InstructLiteError, require
from .steps import Judge, Sample, StepCount, map_texts, named_function

_LINE_ENDS = str.maketrans({"\u2028": "\n", "\u2029": "\n", "\ufeff": None})
_SURE = 0.9  # of the language; a few words of text say too little
_ENOUGH = 40  # characters

Scorer = Callable[[Sequence[str]], Sequence[float]]


def normalise_text(text: str) -> str:
    """NFC (NFKC would change formulas), \\n as the only line end, no byte-order marks, no white space at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_LINE_ENDS))
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()


def normalise(sample: Sample, count: StepCount) -> str | None:
    record = map_texts(sample.record, normalise_text)
    if record != sample.record:
        count.changed["Unicode, line ends or outer white space"] += 1
        sample.record = record
    if not sample.prompt or not all(turn["content"] for turn in sample.turns) or not all(sample.answers):
        return "empty after normalisation"
    if sample.kind == "comparisons" and record["chosen"] == record["rejected"]:
        return "both answers are the same after normalisation"
    return None


def length(minimum: int | None, maximum_prompt: int | None, maximum_answer: int | None) -> Callable[[Sample, StepCount], str | None]:
    """minimum: characters of the best answer. None: no such limit."""

    def judge(sample: Sample, count: StepCount) -> str | None:
        if maximum_prompt is not None and len(sample.prompt) > maximum_prompt:
            return f"prompt too long: {len(sample.prompt)} characters, at most {maximum_prompt}"
        if maximum_answer is not None and (longest := max(map(len, sample.answers), default=0)) > maximum_answer:
            return f"answer too long: {longest} characters, at most {maximum_answer}"
        if minimum is not None and sample.best is not None and len(sample.best) < minimum:
            return f"answer too short: {len(sample.best)} characters, at least {minimum}"
        return None

    return judge


def language(wanted: Sequence[str]) -> Callable[[Sample, StepCount], str | None]:
    """wanted: ISO 639-1 codes. Rows that are in another language for sure go; short ones, of which nobody could tell, stay."""
    py3langid = require("py3langid.langid", "data")
    identifier = py3langid.LanguageIdentifier.from_modelpath(py3langid.MODEL_DIR / py3langid.MODEL_FILE, norm_probs=True)
    unknown = [code for code in wanted if code not in identifier.labels]
    if unknown:
        raise InstructLiteError(f"language={unknown[0]}: no such code; known: {', '.join(sorted(identifier.labels))}")

    def judge(sample: Sample, count: StepCount) -> str | None:
        text = f"{sample.turns[-1]['content'] if sample.turns else sample.prompt}\n{sample.best or ''}"[:2000]
        if len(text) < _ENOUGH:
            return None
        code, probability = identifier.classify(text)
        return f"in another language ({code})" if code not in wanted and probability >= _SURE else None

    return judge


def toxicity_scorer(scorer: str | Scorer) -> Scorer:
    """texts -> probabilities of being toxic: that function itself, or "module:function", or "profanity" for alt-profanity-check."""
    if scorer == "profanity":
        return require("profanity_check", "toxicity").predict_prob
    return named_function("toxicity", scorer) if isinstance(scorer, str) else scorer


def toxicity(scorer: str | Scorer, threshold: float) -> Judge:
    """scorer: see `toxicity_scorer`. The best answer is scored; of prompts and texts, they themselves."""
    score = toxicity_scorer(scorer)

    def judge(samples: list[Sample], count: StepCount) -> list[str | None]:
        scores = list(score([sample.best or sample.prompt for sample in samples])) if samples else []
        return [f"toxic: {value:.2f}" if value >= threshold else None for value in scores]

    return judge
