"""evaluate(): candidates answer the same held-out prompts, judges score the answers, a report says with intervals what came of it.

Candidates and judges are adapters of ONE base in memory, and one batch holds the rows of all candidates.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import BaseOptions
from ..data.records import Source, data_hash, read_records
from ..errors import InstructLiteError
from ..models.base import base_of
from ..models.manifest import Adapter, different_names
from ..models.roles import RoleModel
from ..models.sampling import Progress, Sampling, generate, log_probs
from ..progress import progress
from . import statistics
from .curves import training_of
from .judges import RewardJudge, reward_scores
from .metrics import distinct, kl_per_answer, perplexity, repeated
from .report import Report

Model = str | Path | Adapter
SHOWN_LOSSES, SHOWN_OTHERS = 4, 4


@dataclass(frozen=True)
class Candidate:
    """Who answers: an adapter, loaded as `role`, or the base alone (both None)."""

    name: str
    adapter: Adapter | None
    role: str | None


@dataclass
class Decoding:
    """Everybody's answers to all prompts, drawn one way: prompt by prompt, `samples` of each."""

    name: str
    sampling: Sampling
    samples: int
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    """Candidate -> token ids, with the stop token where one came."""
    scores: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """(judge, candidate) -> (prompts, samples)."""


def evaluate(
    candidates: Model | Sequence[Model],
    data: Source,
    judge: Model | Sequence[Model] | Mapping[str, Model],
    *,
    samples: int = 2,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    greedy: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    prompts: int | None = None,
    max_prompt_length: int | None = None,
    heldout_demonstrations: Source | None = None,
    output_dir: str | Path | None = None,
) -> Report:
    """Compare candidates on held-out prompts.

    candidates: adapters, their directories or Hub repositories (user/repo, user/repo/sft), and "base". Their order counts: the
    first adapter is the KL's reference (SFT, usually), the last candidate is the one that the report's first words are about. The
    last part of each gives the name.
    data: the prompts; other records that have a prompt serve too. `prompts`: the first so many different ones (None: all).
    judge: a reward adapter, best one that PPO was not trained on. Of several, or of {name: adapter}, the first leads.
    samples: answers to each prompt at `temperature`; `greedy` adds one without chance. max_prompt_length: in tokens; longer
    prompts are left out (None: only those that the model's context cannot hold).
    heldout_demonstrations: people's answers, for the perplexity. output_dir: see `Report.save`.

    Raises InstructLiteError for adapters that are damaged or of different bases, and where no prompt is left.
    """
    for name, number in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("prompts", prompts)):
        if number is not None and number < 1:
            raise InstructLiteError(f"{name}={number}: must be at least 1")
    if temperature <= 0:
        raise InstructLiteError(f"temperature={temperature}: must be above 0; greedy=True adds greedy answers")
    entrants, judges = _candidates(candidates), _judges(judge)
    rows = read_records(data, "prompts")
    demonstrations = None if heldout_demonstrations is None else read_records(heldout_demonstrations, "demonstrations")
    seconds: dict[str, float] = {}
    # 1. One base; every candidate and judge is verified and hung into it
    with _phase("load", seconds):
        base = base_of(next((e.adapter for e in entrants if e.adapter), judges[0].adapter), BaseOptions())
        model = RoleModel.load(base, {member.role: member.adapter for member in (*entrants, *judges) if member.adapter})
    # 2. The different prompts that fit
    context = getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = min(context - max_new_tokens, max_prompt_length or math.inf)
    chosen, counts = _prompts(model, rows, longest, prompts)
    run = Comparison(model, entrants, judges, chosen, batch_size, seed, seconds)
    # 3. Answers, 4. Judges
    decodings = [Decoding("sampled", Sampling(max_new_tokens, temperature), samples)]
    decodings += [Decoding("greedy", Sampling(max_new_tokens, 0.0), 1)] if greedy else []
    for decoding in decodings:
        run.answer(decoding)
    run.score(decodings)
    # 5. KL to the reference on own answers, perplexity on people's
    kl = run.kl(decodings[0])
    perplexities = run.perplexity(demonstrations) if demonstrations else {}
    # 6. The report
    settings = {
        **counts, "samples": samples, "temperature": temperature, "greedy": greedy, "max_new_tokens": max_new_tokens,
        "max_prompt_length": max_prompt_length, "batch_size": batch_size, "seed": seed,
        "heldout_demonstrations": len(demonstrations) if demonstrations else None,
        "heldout_demonstrations_sha256": data_hash(demonstrations) if demonstrations else None,
    }  # fmt: skip
    report = run.report(decodings, settings, kl, perplexities)
    if output_dir is not None:
        report.save(output_dir)
    return report


@dataclass
class Comparison:
    """One evaluation under way: who takes part, the prompts, and the seconds each phase took."""

    model: RoleModel
    candidates: list[Candidate]
    judges: list[RewardJudge]
    prompts: list[tuple[list[dict], list[int]]]
    """Messages and their tokens."""
    batch_size: int
    seed: int
    seconds: dict[str, float]

    @property
    def reference(self) -> Candidate | None:
        """The first adapter; None where only the base takes part."""
        return next((candidate for candidate in self.candidates if candidate.adapter), None)

    @property
    def headline(self) -> tuple[Candidate, Candidate] | None:
        """The pair that the report's first words are about: the last candidate against the reference, or else the first one."""
        last = self.candidates[-1]
        other = self.candidates[0] if self.reference in (None, last) else self.reference
        return None if other is last else (last, other)

    def answer(self, decoding: Decoding) -> None:
        """All candidates' answers in mixed batches, the rows of a prompt side by side."""
        rows = list(itertools.product(self.prompts, range(decoding.samples), self.candidates))
        with _phase(f"answers, {decoding.name}", self.seconds, len(rows)) as advance:
            answers = generate(
                self.model, [ids for (_, ids), _, _ in rows], [candidate.role for _, _, candidate in rows], decoding.sampling,
                seed=self.seed, batch_size=self.batch_size, progress=advance,
            )  # fmt: skip
        for (_, _, candidate), ids in zip(rows, answers, strict=True):
            decoding.answers.setdefault(candidate.name, []).append(ids)

    def sequences(self, decoding: Decoding, candidate: Candidate) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids) of one candidate."""
        prompts = [ids for _, ids in self.prompts for _ in range(decoding.samples)]
        return list(zip(prompts, decoding.answers[candidate.name], strict=True))

    def score(self, decodings: list[Decoding]) -> None:
        """Every judge scores every answer.

        Equal answers to a prompt are scored once: in batches of other lengths they would differ in the last bits, and a tie
        would count as a win.
        """
        keys = [(decoding, candidate) for decoding in decodings for candidate in self.candidates]
        parts = [[(tuple(prompt), tuple(answer)) for prompt, answer in self.sequences(*key)] for key in keys]
        different = list(dict.fromkeys(itertools.chain(*parts)))
        sequences = [(list(prompt), list(answer)) for prompt, answer in different]
        with _phase("scores", self.seconds, len(different)) as advance:
            by_judge = reward_scores(self.model, self.judges, sequences, batch_size=self.batch_size, progress=advance)
        for judge, scores in zip(self.judges, by_judge, strict=True):
            score_of = dict(zip(different, scores.tolist(), strict=True))
            for (decoding, candidate), part in zip(keys, parts, strict=True):
                own = np.array([score_of[sequence] for sequence in part])
                decoding.scores[judge.name, candidate.name] = own.reshape(len(self.prompts), decoding.samples)

    def kl(self, decoding: Decoding) -> dict[str, np.ndarray]:
        """KL estimates (prompts, samples) of every adapter to the reference, both at the temperature of the sampling."""
        estimates = {}
        others = [candidate for candidate in self.candidates if candidate.adapter and candidate is not self.reference]
        with _phase("kl", self.seconds, len(self.prompts) * decoding.samples * len(others)) as advance:
            for candidate in others:
                options = {"temperature": decoding.sampling.temperature, "batch_size": self.batch_size, "progress": advance}
                sequences = self.sequences(decoding, candidate)
                policy, reference = log_probs(self.model, [candidate.role, self.reference.role], sequences, **options)
                estimates[candidate.name] = kl_per_answer(policy, reference).reshape(len(self.prompts), decoding.samples)
        return estimates

    def perplexity(self, demonstrations: list[dict]) -> dict[str, float]:
        """Per answer token, the one that ends the answer included."""
        base = self.model.base
        sequences = [(base.encode_prompt(row["prompt"]), base.encode_completion(row["completion"])) for row in demonstrations]
        with _phase("perplexity", self.seconds, len(sequences)) as advance:
            roles = [candidate.role for candidate in self.candidates]
            by_candidate = log_probs(self.model, roles, sequences, batch_size=self.batch_size, progress=advance)
        return {candidate.name: perplexity(found) for candidate, found in zip(self.candidates, by_candidate, strict=True)}

    def report(self, decodings: list[Decoding], settings: dict, kl: dict[str, np.ndarray], perplexities: dict[str, float]) -> Report:
        base = self.model.base
        pairs = [(a, b) for b, a in itertools.combinations(self.candidates, 2)]
        pairs.sort(key=lambda pair: pair != self.headline)  # the headline's pair first
        rewards = [self._reward(d, judge, c) for d in decodings for judge in self.judges for c in self.candidates]
        texts = [self._text(d, c) for d in decodings for c in self.candidates]
        return Report(
            base={name: getattr(base, name) for name in ("id", "revision", "fingerprint", "quantization", "dtype")},
            settings=settings,
            reference=self.reference.name if self.reference else None,
            headline=[candidate.name for candidate in self.headline] if self.headline else None,
            candidates=[self._candidate(c, rewards, texts, kl, perplexities) for c in self.candidates],
            judges=[judge.to_dict({c.name: c.adapter for c in self.candidates if c.adapter}) for judge in self.judges],
            win_rates=[self._win_rate(d, judge, a, b) for d in decodings for judge in self.judges for a, b in pairs],
            rewards=rewards,
            texts=texts,
            sharpening=self._sharpening(decodings),
            samples=self._samples(decodings[0]),
            seconds=self.seconds,
            training=list(filter(None, (training_of(c.name, c.adapter) for c in self.candidates if c.adapter))),
            answers=[self._answers(decodings, number) for number in range(len(self.prompts))],
        )

    def _reward(self, decoding: Decoding, judge: RewardJudge, candidate: Candidate) -> dict[str, Any]:
        reward = statistics.mean(decoding.scores[judge.name, candidate.name], seed=self.seed)
        return {"candidate": candidate.name, "judge": judge.name, "decoding": decoding.name, **_flat("mean_reward", reward)}

    def _text(self, decoding: Decoding, candidate: Candidate) -> dict[str, Any]:
        answers, stops = decoding.answers[candidate.name], self.model.base.stop_ids
        words = [ids[:-1] if ids[-1] in stops else ids for ids in answers]
        return {
            "candidate": candidate.name,
            "decoding": decoding.name,
            "length": float(np.mean([len(ids) for ids in answers])),
            "ended": float(np.mean([ids[-1] in stops for ids in answers])),
            "distinct_2": distinct(words, 2),
            "repeated_trigrams": repeated(words, 3),
        }

    def _candidate(
        self, candidate: Candidate, rewards: list[dict], texts: list[dict], kl: dict[str, np.ndarray], perplexities: dict[str, float]
    ) -> dict[str, Any]:
        """The row of a candidate: what it is, then its sampled answers, the first judge's opinion of them, KL and perplexity."""
        reward = next(row for row in rewards if row["candidate"] == candidate.name)
        text = next(row for row in texts if row["candidate"] == candidate.name)
        estimates = np.zeros((len(self.prompts), 1)) if candidate is self.reference else kl.get(candidate.name)
        return {
            "name": candidate.name,
            "base": self.model.base.id,
            "adapter": candidate.adapter.sha256 if candidate.adapter else None,
            **{name: reward[name] for name in ("mean_reward", "mean_reward_low", "mean_reward_high")},
            "kl": None if estimates is None else float(estimates.mean()),
            "kl_standard_error": None if estimates is None else statistics.standard_error(estimates),
            "perplexity": perplexities.get(candidate.name),
            **{name: text[name] for name in ("length", "ended", "distinct_2", "repeated_trigrams")},
        }

    def _win_rate(self, decoding: Decoding, judge: RewardJudge, a: Candidate, b: Candidate) -> dict[str, Any]:
        ours, theirs = decoding.scores[judge.name, a.name], decoding.scores[judge.name, b.name]
        gain = statistics.mean(ours.mean(1) - theirs.mean(1), seed=self.seed)
        names = {"a": a.name, "b": b.name, "judge": judge.name, "decoding": decoding.name}
        rate = statistics.win_rate(ours, theirs, seed=self.seed)
        return {**names, "rate": rate.value, "low": rate.low, "high": rate.high, "prompts": len(self.prompts), **_flat("gain", gain)}

    def _sharpening(self, decodings: list[Decoding]) -> dict[str, Any] | None:
        """How much of a's gain over b (see `headline`) b reaches too, without any training, by greedy decoding.

        None where there is no greedy decoding, or no gain that is clear of 0 to take a share of.
        """
        if len(decodings) < 2 or self.headline is None:
            return None
        (a, b), judge, (sampled, greedy) = self.headline, self.judges[0].name, decodings
        start, part, end = sampled.scores[judge, b.name], greedy.scores[judge, b.name], sampled.scores[judge, a.name]
        if statistics.mean(end.mean(1) - start.mean(1), seed=self.seed).side_of(0) <= 0:
            return None
        share = statistics.share_of_gain(start, part, end, seed=self.seed)
        return {"a": a.name, "b": b.name, "judge": judge, **_flat("share", share)}

    def _samples(self, decoding: Decoding) -> list[dict[str, Any]]:
        """Which answers the report shows: those where a lost most to b (see `headline`), then those to the first prompts."""
        losses = []
        if self.headline is not None:
            a, b = (decoding.scores[self.judges[0].name, candidate.name] for candidate in self.headline)
            worst = np.argsort((a - b).min(1), kind="stable")[:SHOWN_LOSSES]
            losses = [{"prompt": int(i), "sample": int((a - b)[i].argmin()), "why": "loss"} for i in worst if (a - b)[i].min() < 0]
        others = [i for i in range(len(self.prompts)) if i not in {row["prompt"] for row in losses}]
        return losses + [{"prompt": i, "sample": 0, "why": "first"} for i in others[:SHOWN_OTHERS]]

    def _answers(self, decodings: list[Decoding], number: int) -> dict[str, Any]:
        """One prompt and all answers to it, for answers.jsonl."""
        answers = []
        for decoding, candidate in itertools.product(decodings, self.candidates):
            for sample in range(decoding.samples):
                ids = decoding.answers[candidate.name][number * decoding.samples + sample]
                scores = {judge.name: float(decoding.scores[judge.name, candidate.name][number, sample]) for judge in self.judges}
                answers.append({
                    "candidate": candidate.name, "decoding": decoding.name, "sample": sample, "text": self.model.base.decode(ids),
                    "tokens": len(ids), "ended": ids[-1] in self.model.base.stop_ids, "scores": scores,
                })  # fmt: skip
        return {"prompt": self.prompts[number][0], "answers": answers}


def _candidates(given: Model | Sequence[Model]) -> list[Candidate]:
    members = [member if member == "base" else Adapter.load(member) for member in _listed(given)]
    if not members:
        raise InstructLiteError('candidates: there are none; pass adapters, "base", or both')
    for member in members:
        if member != "base" and member.role != "policy":
            raise InstructLiteError(f"{member}: a {member.role} adapter cannot answer; pass adapters of SFT or PPO as candidates")
    # Roles have names of their own: PEFT takes no dots in them, torch no names of its own methods ("train", "eval").
    return [
        Candidate(name, None, None) if member == "base" else Candidate(name, member, f"candidate{number}")
        for number, (name, member) in enumerate(zip(different_names(members), members, strict=True))
    ]


def _judges(given: Model | Sequence[Model] | Mapping[str, Model]) -> list[RewardJudge]:
    if isinstance(given, Mapping):
        names, members = list(given), [Adapter.load(member) for member in given.values()]
    else:
        members = [Adapter.load(member) for member in _listed(given)]
        names = different_names(members)
    if not members:
        raise InstructLiteError("judge: there is none; pass a reward adapter")
    return [RewardJudge(name, member, f"judge{number}") for number, (name, member) in enumerate(zip(names, members, strict=True))]


def _listed(given: Model | Sequence[Model]) -> Sequence[Model]:
    return [given] if isinstance(given, (str, Path, Adapter)) else given


def _prompts(
    model: RoleModel, rows: list[dict], longest: float, limit: int | None
) -> tuple[list[tuple[list[dict], list[int]]], dict[str, int]]:
    """The first `limit` different prompts of at most `longest` tokens, and what became of the rows."""
    encoded: dict[tuple[int, ...], list[dict]] = {}
    for row in rows:
        encoded.setdefault(tuple(model.base.encode_prompt(row["prompt"])), row["prompt"])
    fitting = [(prompt, list(ids)) for ids, prompt in encoded.items() if len(ids) <= longest]
    if not fitting:
        shortest = min(map(len, encoded))
        raise InstructLiteError(f"no prompt has at most {longest:g} tokens (the shortest has {shortest}); raise max_prompt_length")
    chosen = fitting[:limit]
    return chosen, {
        "rows": len(rows),
        "repeated": len(rows) - len(encoded),
        "too_long": len(encoded) - len(fitting),
        "prompts": len(chosen),
        "prompts_sha256": data_hash({"prompt": prompt} for prompt, _ in chosen),
    }


def _flat(name: str, interval: statistics.Interval) -> dict[str, float | None]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


@contextmanager
def _phase(name: str, seconds: dict[str, float], rows: int = 0) -> Iterator[Progress]:
    """Notes how long it takes; shows progress where there are rows to count."""
    start = time.perf_counter()
    with progress(f"evaluate: {name}", rows) if rows else nullcontext(lambda done: None) as advance:
        yield advance
    seconds[name] = round(time.perf_counter() - start, 2)
