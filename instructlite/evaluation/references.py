"""Answers against texts that are given: people's answers (exact match, BLEU, ROUGE-L, BERTScore, MAUVE), or the passage asked about.

One answer is compared with one reference; corpus BLEU and MAUVE are about all answers together. No number here knows whether an answer
is right: a good answer in other words scores low, so only compare candidates on the same references.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import InstructLiteError, require
from .statistics import Interval

RESAMPLES = 1_000  # of BLEU
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"\d[\d.,]*\d|\w+")
_FUNCTION_WORDS = """
about above after again all also although and any are because been before being below between both but can could did does doing down during
each either few for from further had has have having her here hers him his how however into its just may might more most much must nor not
off once one only other our out over own same shall she should since some such than that the their them then there these they this those
though through thus too under until upon very was were what when where whether which while who whom whose why will with within without would
yes yet you your answer according text passage paragraph mentioned following given called known name names
"""
_NO_CONTENT = frozenset(_FUNCTION_WORDS.split())
SELF_BLEU_TEXTS = 100


def require_all(*, encoder: str | None = None, mauve: bool = False) -> None:
    """Raises InstructLiteError, with the pip command, for the first package that is missing, or for BERTScore's encoder."""
    optional = [("bert_score", "references")] * bool(encoder) + [("mauve", "references")] * mauve
    for module, extra in [("sacrebleu", "eval"), ("rouge_score", "eval"), *optional]:
        require(module, extra)
    if encoder:
        _encoder_config(encoder)


def _encoder_config(encoder: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        raise InstructLiteError(f"bert_score={encoder}: no such encoder here or on the Hub ({str(error).splitlines()[0]})") from error


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same words, as SQuAD compares them: case, punctuation and articles aside (Rajpurkar et al. 2016)."""
    return float(_plain(answer) == _plain(reference))


def _plain(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.casefold().translate(_PUNCTUATION)).split()


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """F1 of the longest common subsequence of stemmed words (Lin 2004), one an answer; rouge-score's, for texts in Latin letters."""
    scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in zip(answers, references, strict=True)])


def bleu(answers: Sequence[Sequence[str]], references: Sequence[str], *, seed: int = 0) -> Interval:
    """Corpus BLEU, 0 to 100 (sacrebleu's defaults), with a percentile bootstrap over prompts: an entry of `answers` is a prompt's."""
    metric = require("sacrebleu.metrics", "eval").BLEU(effective_order=True)  # which the corpus score does not heed
    counts = np.array([
        sum(_counts(metric.sentence_score(answer, [reference])) for answer in own)
        for own, reference in zip(answers, references, strict=True)
    ])  # fmt: skip
    value = _corpus_bleu(metric, counts.sum(0))
    if len(counts) < 2:
        return Interval(value)
    draws = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES)
    low, high = np.quantile([_corpus_bleu(metric, total) for total in draws @ counts], [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _counts(score: Any) -> np.ndarray:
    """What BLEU adds up over a corpus: n-grams that match and n-grams, n = 1 to 4, then both lengths."""
    return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len])


def _corpus_bleu(metric: Any, total: np.ndarray) -> float:
    correct, ngrams, (ours, theirs) = total[:4].tolist(), total[4:8].tolist(), total[8:].tolist()
    return float(metric.compute_bleu(correct, ngrams, ours, theirs, smooth_method="exp").score)


def self_bleu(texts: Sequence[str]) -> np.ndarray:
    """BLEU of each text with all others as its references (Zhu et al. 2018), NaN for empty ones: 100 where all are the same.

    Of more than SELF_BLEU_TEXTS texts the first so many are taken, here and for every candidate: the number grows with theirs.
    """
    metric = require("sacrebleu.metrics", "eval").BLEU(effective_order=True)
    scores = np.full(len(texts), np.nan)
    some = list(texts[:SELF_BLEU_TEXTS])
    for number, text in enumerate(some):
        if text.strip() and len(some) > 1:
            scores[number] = metric.sentence_score(text, some[:number] + some[number + 1 :]).score
    return scores


def bert_score(answers: Sequence[str], references: Sequence[str], model: str) -> np.ndarray:
    """F1 of greedily matched contextual embeddings (Zhang et al. 2020), not rescaled; model: an encoder of the Hub or its directory."""
    library = require("bert_score", "references")
    config = _encoder_config(model)
    # The layer that agreed best with people, of encoders that bert-score's authors tried; else the last one.
    layers = library.utils.model2layers.get(model, config.num_hidden_layers)
    scorer = library.BERTScorer(model_type=model, num_layers=layers)
    # Tokenizers that name no longest text say 1e30, which bert-score 0.3.13 hands on as a length and fails.
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, config.max_position_embeddings)
    return scorer.score(list(answers), list(references))[2].double().numpy()


def mauve(answers: np.ndarray, references: np.ndarray, *, seed: int = 0) -> float:
    """How much the distributions of answers and references overlap, 0 to 1 (Pillutla et al. 2021), from features (texts, size).

    Meant for thousands of texts: of fewer, only large differences say something.
    """
    result = require("mauve", "references").compute_mauve(answers, references, seed=seed, verbose=False)
    return float(result.mauve)


def content_words(text: str) -> list[str]:
    """Words that carry content, stemmed: numbers, and words of three letters and more that are no function words."""
    stem = require("nltk.stem.porter", "eval").PorterStemmer().stem
    words = [word.casefold().rstrip(".,").replace(",", "") for word in _WORD.findall(text)]
    return [stem(word) for word in words if word[0].isdigit() or (len(word) > 2 and word not in _NO_CONTENT)]


def unsupported(answer: str, given: Iterable[str]) -> float:
    """The share of an answer's content words - names and numbers among them - that are in none of the given texts; NaN without any.

    A proxy for hallucination: it takes a fact in other words for a made-up one, and misses false statements made of given words.
    It is meant for comparing candidates on the same passages.
    """
    words = content_words(answer)
    known = {word for text in given for word in content_words(text)}
    return float(np.mean([word not in known for word in words])) if words else float("nan")
