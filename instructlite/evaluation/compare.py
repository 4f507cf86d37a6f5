"""evaluate(): candidates answer the same held-out prompts, judges say whose are better, a report says with intervals what came of it.

Candidates and reward judges are adapters of ONE base in memory, and one batch holds the rows of all candidates. What is drawn,
scored or said is kept beside the report (kept.py), so that an evaluation goes on where it was stopped.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import BaseOptions, Lora
from ..data.records import Source, as_groups, data_hash, read_records
from ..errors import InstructLiteError
from ..models.base import base_of, lora_config
from ..models.roles import RoleModel
from ..models.sampling import Sampling
from ..progress import Advance, progress
from ..training.peers import Peers
from . import statistics
from .candidates import Candidate, Model, Prompting, candidates_of
from .curves import training_of
from .judges import ACCURACY, SCALES, VERDICTS, Judge, LanguageModelJudge, People, RewardJudge, Scale, accuracy, judges_of, reward_judge
from .judging import Decoding, Judging, Match, flat
from .kept import FILE, Asked, Kept, KeptModel
from .metrics import distinct, kl_per_answer, perplexity, repeated
from .prompt_sets import PromptSet, category_in
from .report import Report
from .side_effects import AnsweredSet, SideEffects
from .side_effects import side_effects as measure_side_effects
from .workers import Workers

SHOWN_LOSSES, SHOWN_OTHERS = 4, 4
MOST_COMPARISONS = 200  # of people, that a language model is asked about in both orders


def evaluate(
    candidates: Model | Sequence[Model] | Mapping[str, Model],
    data: Source,
    judge: Model | Judge | Sequence[Model | Judge] | Mapping[str, Model | Judge],
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
    demonstrations: Source | None = None,
    reward: Model | None = None,
    comparisons: Source | None = None,
    votes: Sequence[Mapping[str, Any]] = (),
    ratings: Sequence[Scale] = (),
    side_effects: bool | SideEffects = False,
    output_dir: str | Path | None = None,
) -> Report:
    """Compare candidates on held-out prompts.

    candidates: see candidates.py: "base", adapters, their directories or Hub repositories (user/repo, user/repo/sft), "few-shot:4",
    "context", "best-of-4". Their order counts: the first adapter is the KL's reference (SFT, usually), the last candidate is the
    one that the report's first words are about. The last part of each gives the name, unless they are given as {name: candidate}.
    data: the prompts; other records that have a prompt serve too. `prompts`: the first so many different ones (None: all).
    judge: see judges.py; a reward adapter, best one that PPO was not trained on. Of several, or of {name: judge}, the first leads.
    samples: answers to each prompt at `temperature`; `greedy` adds one without chance. max_prompt_length: in tokens; longer
    prompts are left out (None: only those that the model's context cannot hold).
    heldout_demonstrations: people's answers, for the perplexity. demonstrations: what few-shot shows. reward: the reward adapter
    that best-of-n chooses by. comparisons: people's, on which judges are judged that have no accuracy from their own training.
    votes: people's on the candidates' answers, rows as People.of takes them. ratings: scales on which language models rate each
    answer. side_effects: toxicity, made-up answers, what was forgotten … on prompts of their own, see side_effects.py (True: all that
    needs no more). Rows of `data` may carry a `context`, and a `reference` to judge by. output_dir: see `Report.save`; what was drawn,
    scored and said is kept there, too.

    Several processes of a launcher share the work: all of them call this and get the report, the main one alone asks language models
    and writes.

    Raises InstructLiteError for adapters that are damaged or of different bases, and where no prompt is left.
    """
    _check(temperature, ratings, samples=samples, max_new_tokens=max_new_tokens, batch_size=batch_size, prompts=prompts)
    directory = None if output_dir is None else Path(output_dir)
    entrants, judges = candidates_of(candidates), judges_of(judge, None if directory is None else directory / VERDICTS)
    chooser, effects = _chooser(entrants, reward), _effects(side_effects, judges)
    rows = read_records(data, "prompts")
    shots = _shots(entrants, demonstrations)
    judged = [] if comparisons is None else _comparisons(comparisons)
    heldout = None if heldout_demonstrations is None else read_records(heldout_demonstrations, "demonstrations")
    seconds: dict[str, float] = {}
    # 1. One base; every candidate and judge is verified and hung into it
    with _phase(seconds, "load"):
        model = _load(entrants, [*judges, *([chooser] if chooser else [])])
    # 2. The different prompts that fit
    context = model.base.context
    chosen, counts = _prompts(model, rows, min(context - max_new_tokens, max_prompt_length or math.inf), prompts)
    prompting = Prompting.of(model.base.encode_prompt, context - max_new_tokens, shots, seed)
    workers = Workers.of_this_launch()
    kept = Kept(None if directory is None or (workers and workers.rank) else directory / FILE)
    computing = KeptModel(model, kept, batch_size, partial(_phase, seconds), workers=workers)
    run = Comparison(computing, entrants, [*judges, *_people(votes, entrants)], chooser, chosen, prompting, seed, seconds)
    settings = {
        **counts, "samples": samples, "temperature": temperature, "greedy": greedy, "max_new_tokens": max_new_tokens,
        "max_prompt_length": max_prompt_length, "batch_size": batch_size, "seed": seed, **_counted("heldout_demonstrations", heldout),
    }  # fmt: skip

    def compared() -> Report:
        # 3. Answers
        decodings = [Decoding("sampled", Sampling(max_new_tokens, temperature), samples)]
        decodings += [Decoding("greedy", Sampling(max_new_tokens, 0.0), 1)] if greedy else []
        for decoding in decodings:
            run.answer(decoding)
        # 4. Side effects, KL to the reference on own answers, perplexity on people's  5. Judges, and the report
        measured = run.side_effects(effects, decodings, heldout) if effects else []
        report = run.report(decodings, settings, run.kl(decodings[0]), run.perplexity(heldout) if heldout else {}, judged, ratings)
        report.side_effects = measured
        if output_dir is not None:
            report.save(output_dir)
        return report

    if workers is None:
        return compared()
    with Peers("what was answered and scored is kept: start it again") as peers:
        peers.meet()
        return workers.serve(run.model_of) if workers.rank else workers.lead(compared)


@dataclass
class Comparison:
    """One evaluation under way: who takes part, the prompts, and the seconds each phase took."""

    model: KeptModel
    candidates: list[Candidate]
    judges: list[Judge]
    chooser: RewardJudge | None
    """Whose scores decide which of n answers is the best."""
    prompts: list[tuple[dict, list[int]]]
    """Rows and the tokens of their conversations."""
    prompting: Prompting
    seed: int
    seconds: dict[str, float]
    _merged: dict[str, KeptModel] = field(default_factory=dict)

    @property
    def reference(self) -> Candidate | None:
        """The first adapter; None where only the base takes part."""
        return next((candidate for candidate in self.candidates if candidate.kind == "adapter"), None)

    @property
    def headline(self) -> tuple[Candidate, Candidate] | None:
        """The pair that the report's first words are about: the last candidate against the reference, or else the first one."""
        last = self.candidates[-1]
        other = self.candidates[0] if self.reference in (None, last) else self.reference
        return None if other is last else (last, other)

    def answer(self, decoding: Decoding) -> None:
        """All candidates' answers in mixed batches, the rows of a prompt side by side; the best of n equal answers is none."""
        taking_part = [c for c in self.candidates if c.kind != "best-of-n" or decoding.sampling.temperature > 0]
        asked: dict[str | None, list[Asked]] = {}
        for (row, _), candidate in itertools.product(self.prompts, taking_part):
            ids = tuple(self.prompting.ids(candidate, row))
            count = decoding.samples * candidate.draws
            draws = [Asked(candidate.name, candidate.role, ids, i, candidate.draws) for i in range(count)]
            asked.setdefault(candidate.name if candidate.kind == "merged" else None, []).extend(draws)
        drawn: dict[str, list[list[int]]] = {candidate.name: [] for candidate in taking_part}
        for merged, part in asked.items():
            label = f"answers, {decoding.name}" + (f", {merged}" if merged else "")
            answers = self._model_of(merged).answers(part, decoding.sampling, self.seed, label)
            for one, ids in zip(part, answers, strict=True):
                drawn[one.name].append(ids)
        for candidate in taking_part:
            own = drawn[candidate.name]
            decoding.answers[candidate.name] = own if candidate.draws == 1 else self._best(candidate, own, decoding)
            decoding.texts[candidate.name] = [self.model.model.base.decode(ids) for ids in decoding.answers[candidate.name]]

    def _best(self, candidate: Candidate, drawn: list[list[int]], decoding: Decoding) -> list[list[int]]:
        """Of each n answers the one that the training reward model scores highest."""
        prompts = [ids for _, ids in self.prompts for _ in range(decoding.samples * candidate.draws)]
        scores = self.model.scores(self.chooser.roles, list(zip(prompts, drawn, strict=True)), f"{candidate.name}: choosing")
        best = self.chooser.combined(scores).reshape(-1, candidate.draws).argmax(1)
        return [drawn[number * candidate.draws + place] for number, place in enumerate(best)]

    def sequences(self, decoding: Decoding, candidate: str) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids) of one candidate: whatever else it was shown, it is judged by the prompt."""
        prompts = [ids for _, ids in self.prompts for _ in range(decoding.samples)]
        return list(zip(prompts, decoding.answers[candidate], strict=True))

    def score(self, decodings: list[Decoding]) -> None:
        """Every reward judge scores every answer."""
        judges = [judge for judge in self.judges if isinstance(judge, RewardJudge)]
        keys = [(decoding, name) for decoding in decodings for name in decoding.answers]
        sequences = [sequence for key in keys for sequence in self.sequences(*key)]
        by_role = self.model.scores([role for judge in judges for role in judge.roles], sequences, "scores") if judges else {}
        for judge in judges:
            scores, start = judge.combined(by_role), 0
            for decoding, name in keys:
                end = start + len(self.prompts) * decoding.samples
                decoding.scores[judge.name, name] = scores[start:end].reshape(len(self.prompts), decoding.samples)
                start = end

    def kl(self, decoding: Decoding) -> dict[str, np.ndarray]:
        """KL estimates (prompts, samples) of every adapter to the reference, both at the temperature of the sampling."""
        estimates = {}
        for candidate in self.candidates:
            if candidate.kind in ("adapter", "merged") and candidate is not self.reference and self.reference:
                sequences, label = self.sequences(decoding, candidate.name), f"KL of {candidate.name}"
                own = self.log_probs_of([candidate, self.reference], sequences, label, temperature=decoding.sampling.temperature)
                estimates[candidate.name] = kl_per_answer(*own.values()).reshape(len(self.prompts), decoding.samples)
        return estimates

    def perplexity(self, demonstrations: list[dict]) -> dict[str, float]:
        """Per answer token, the one that ends the answer included. What is chosen from several answers has none."""
        able = [candidate for candidate in self.candidates if candidate.kind in ("base", "few-shot", "adapter", "merged")]
        found = {}
        for shown, group in itertools.groupby(sorted(able, key=lambda c: c.n or 0), key=lambda c: c.n):
            members = list(group)
            completions = [self.model.model.base.encode_completion(row["completion"]) for row in demonstrations]
            sequences = [(self.prompting.ids(members[0], row), ids) for row, ids in zip(demonstrations, completions, strict=True)]
            by_name = self.log_probs_of(members, sequences, "perplexity" if shown is None else f"perplexity, {members[0].name}")
            found |= {name: perplexity(own) for name, own in by_name.items()}
        return found

    def log_probs_of(self, candidates: Sequence[Candidate], sequences: Sequence, label: str, **options: Any) -> dict[str, list]:
        """By candidate, in their order; those in the one base together."""
        inside = list(dict.fromkeys(candidate.role for candidate in candidates if candidate.kind != "merged"))
        by_role = self.model.log_probs(inside, sequences, label, **options)
        found = {}
        for candidate in candidates:
            if candidate.kind == "merged":
                own = self._model_of(candidate.name).log_probs([None], sequences, f"{label}, {candidate.name}", **options)
                found[candidate.name] = own[None]
            else:
                found[candidate.name] = by_role[candidate.role]
        return found

    # --- what side effects are measured with ------------------------------------------------------------------------

    @property
    def roles(self) -> RoleModel:
        return self.model.model

    def model_of(self, merged: str | None) -> RoleModel:
        """What a worker computes with."""
        return self._model_of(merged).model

    def prompt_ids(self, candidate: Candidate, row: dict) -> list[int]:
        return self.prompting.ids(candidate, row)

    def answers_to(self, rows: Sequence[dict], sampling: Sampling, samples: int, name: str) -> dict[str, list[list[int]]]:
        """Everybody's answers to other prompts, prompt by prompt."""
        decoding = Decoding(name, sampling, samples)
        replace(self, prompts=[(row, self.roles.base.encode_prompt(row["prompt"])) for row in rows]).answer(decoding)
        return decoding.answers

    def side_effects(self, options: SideEffects, decodings: list[Decoding], demonstrations: list[dict] | None) -> list[dict[str, Any]]:
        rows = [
            {"prompt": row["prompt"], "completion": row.get("reference"), "category": category_in(row, "prompts")}
            for row, _ in self.prompts
        ]
        known = PromptSet("held-out", rows)
        held_out = [AnsweredSet(known, one.name, one.sampling, one.samples, one.answers) for one in decodings]
        return measure_side_effects(self, options, decodings[0].sampling, held_out=held_out, demonstrations=demonstrations)

    def _model_of(self, merged: str | None) -> KeptModel:
        """Of a merged model its own, one of them at a time beside the base; None: the base with all adapters."""
        if merged is None:
            return self.model
        if merged not in self._merged:
            self._merged.clear()
            path = next(candidate.path for candidate in self.candidates if candidate.name == merged)
            base, own = base_of(path, BaseOptions(dtype=self.model.model.base.dtype)), self.model.model.base
            for what in ("tokenizer_sha256", "template_sha256"):
                if getattr(base, what) != getattr(own, what):
                    raise InstructLiteError(f"{path}: its {what.split('_')[0]} is not that of {own.id}: its answers cannot be judged by it")
            # A RoleModel has at least one adapter; this one is never active.
            model = RoleModel.load(base, {"spare": lora_config(Lora(r=1, alpha=1, top_layers=1), base.model, "CAUSAL_LM")})
            self._merged[merged] = KeptModel(
                model, self.model.kept, self.model.batch_size, self.model.phase, workers=self.model.workers, merged=merged
            )  # fmt: skip
        return self._merged[merged]

    def report(
        self, decodings: list[Decoding], settings: dict, kl: dict[str, np.ndarray], perplexities: dict[str, float],
        judged: list[dict], ratings: Sequence[Scale] = (),
    ) -> Report:  # fmt: skip
        self.score(decodings)
        base, names = self.model.model.base, tuple(c.name for c in self.headline) if self.headline else None
        reference = self.reference.name if self.reference else None
        judging = Judging(self.judges, decodings, [row for row, _ in self.prompts], names, reference, self.seed)
        with _phase(self.seconds, "language models judge"):
            total, rated = judging.rates, judging.ratings(ratings)  # they are asked before the next bar stands
        with _phase(self.seconds, "win rates", total) as advance:
            win_rates, strengths, agreement = judging.win_rates(advance), judging.strengths(), judging.agreement()
        rewards = [self._reward(d, judge, name) for d in decodings for judge in self._measures for name in d.answers]
        texts = [self._text(d, name) for d in decodings for name in d.answers]
        return Report(
            base={name: getattr(base, name) for name in ("id", "revision", "fingerprint", "quantization", "dtype")},
            settings=settings,
            reference=reference,
            headline=list(names) if names else None,
            candidates=[self._candidate(c, rewards, texts, kl, perplexities) for c in self.candidates],
            judges=[judge.to_dict(self._rewarded_by()) | self._accuracy(judge, judged) | judging.heard(judge) for judge in self.judges],
            win_rates=win_rates,
            rewards=rewards,
            texts=texts,
            sharpening=self._sharpening(decodings),
            samples=self._samples(judging, decodings[0]),
            seconds=self.seconds,
            training=[row for c in self.candidates if c.kind == "adapter" and (row := training_of(c.name, c.adapter))],
            answers=[self._answers(decodings, number) for number in range(len(self.prompts))],
            strengths=strengths,
            agreement=agreement,
            ratings=rated,
            costs=[cost for candidate in self.candidates if (cost := candidate.cost())],
        )

    def _rewarded_by(self) -> dict[str, set[str]]:
        """By candidate the hashes of the reward models that it was trained on, or that its answers are chosen by."""
        parents = {c.name: c.adapter.manifest.parents for c in self.candidates if c.adapter}
        found = {name: {own[role] for role in own.keys() - {"sft", "policy"}} for name, own in parents.items()}  # the rest are rewards
        for candidate in self.candidates:
            if candidate.kind == "best-of-n":
                found.setdefault(candidate.name, set()).update(member.sha256 for member in self.chooser.members)
        return found

    def _accuracy(self, judge: Judge, comparisons: list[dict]) -> dict[str, Any]:
        """How often a judge prefers what people preferred, where there are comparisons, and its own training has not measured it."""
        if not comparisons or isinstance(judge, People) or judge.to_dict({})["accuracy"] is not None:
            return {}
        if isinstance(judge, LanguageModelJudge):
            found = judge.accuracy(comparisons, seed=self.seed)
            return {name: found[name] for name in ACCURACY}
        base, sides = self.model.model.base, ("chosen", "rejected")
        sequences = [(base.encode_prompt(row["prompt"]), base.encode_completion(row[side])) for side in sides for row in comparisons]
        scores = judge.combined(self.model.scores(judge.roles, sequences, f"accuracy of {judge.name}")).reshape(2, -1)
        return accuracy(comparisons, [0.5 + 0.5 * float(np.sign(a - b)) for a, b in scores.T], seed=self.seed)

    @property
    def _measures(self) -> list[RewardJudge]:
        """Judges that give each answer a number."""
        return [judge for judge in self.judges if isinstance(judge, RewardJudge)]

    def _reward(self, decoding: Decoding, judge: RewardJudge, name: str) -> dict[str, Any]:
        reward = statistics.mean(decoding.scores[judge.name, name], seed=self.seed)
        return {"candidate": name, "judge": judge.name, "decoding": decoding.name, **flat("mean_reward", reward)}

    def _text(self, decoding: Decoding, name: str) -> dict[str, Any]:
        answers, stops = decoding.answers[name], self.model.model.base.stop_ids
        words = [ids[:-1] if ids[-1] in stops else ids for ids in answers]
        return {
            "candidate": name,
            "decoding": decoding.name,
            "length": float(np.mean([len(ids) for ids in answers])),
            "ended": float(np.mean([ids[-1] in stops for ids in answers])),
            "distinct_2": distinct(words, 2),
            "repeated_trigrams": repeated(words, 3),
        }

    def _candidate(
        self, candidate: Candidate, rewards: list[dict], texts: list[dict], kl: dict[str, np.ndarray], perplexities: dict[str, float]
    ) -> dict[str, Any]:
        """The row of a candidate: what it is, then its sampled answers, the first reward judge's opinion of them, KL and perplexity."""
        reward = next((row for row in rewards if row["candidate"] == candidate.name), flat("mean_reward", None))
        text = next(row for row in texts if row["candidate"] == candidate.name)
        estimates = np.zeros((len(self.prompts), 1)) if candidate is self.reference else kl.get(candidate.name)
        return {
            **candidate.to_dict(),
            "base": self.model.model.base.id,
            **{name: reward[name] for name in ("mean_reward", "mean_reward_low", "mean_reward_high")},
            "kl": None if estimates is None else float(estimates.mean()),
            "kl_standard_error": None if estimates is None else statistics.standard_error(estimates),
            "perplexity": perplexities.get(candidate.name),
            **{name: text[name] for name in ("length", "ended", "distinct_2", "repeated_trigrams")},
        }

    def _sharpening(self, decodings: list[Decoding]) -> dict[str, Any] | None:
        """How much of a's gain over b (see `headline`) b reaches too, without any training, by greedy decoding.

        None where there is no greedy decoding, or no gain that is clear of 0 to take a share of.
        """
        if len(decodings) < 2 or self.headline is None or not self._measures:
            return None
        (a, b), judge, (sampled, greedy) = self.headline, self._measures[0].name, decodings
        if b.name not in greedy.answers:
            return None
        start, part, end = sampled.scores[judge, b.name], greedy.scores[judge, b.name], sampled.scores[judge, a.name]
        if statistics.mean(end.mean(1) - start.mean(1), seed=self.seed).side_of(0) <= 0:
            return None
        share = statistics.share_of_gain(start, part, end, seed=self.seed)
        return {"a": a.name, "b": b.name, "judge": judge, **flat("share", share)}

    def _samples(self, judging: Judging, decoding: Decoding) -> list[dict[str, Any]]:
        """Which answers the report shows: those where a lost most to b (see `headline`), then those to the first prompts."""
        losses = []
        if self.headline is not None:
            a, b = self.headline
            margins = judging.margins(self.judges[0], Match(a.name, b.name, decoding.name, decoding.name))
            worst = [] if margins is None else np.argsort(margins.min(1), kind="stable")[:SHOWN_LOSSES]
            losses = [{"prompt": int(i), "sample": int(margins[i].argmin()), "why": "loss"} for i in worst if margins[i].min() < 0]
        others = [i for i in range(len(self.prompts)) if i not in {row["prompt"] for row in losses}]
        return losses + [{"prompt": i, "sample": 0, "why": "first"} for i in others[:SHOWN_OTHERS]]

    def _answers(self, decodings: list[Decoding], number: int) -> dict[str, Any]:
        """One prompt and all answers to it, for answers.jsonl."""
        answers = []
        for decoding in decodings:
            for name, sample in itertools.product(decoding.answers, range(decoding.samples)):
                place = number * decoding.samples + sample
                ids = decoding.answers[name][place]
                scores = {judge.name: float(decoding.scores[judge.name, name][number, sample]) for judge in self._measures}
                answers.append({
                    "candidate": name, "decoding": decoding.name, "sample": sample, "text": decoding.texts[name][place],
                    "tokens": len(ids), "ended": ids[-1] in self.model.model.base.stop_ids, "scores": scores,
                })  # fmt: skip
        return {"prompt": self.prompts[number][0]["prompt"], "answers": answers}


def _check(temperature: float, ratings: Sequence[str], **counts: int | None) -> None:
    for name, number in counts.items():
        if number is not None and number < 1:
            raise InstructLiteError(f"{name}={number}: must be at least 1")
    if temperature <= 0:
        raise InstructLiteError(f"temperature={temperature}: must be above 0; greedy=True adds greedy answers")
    if unknown := [scale for scale in ratings if scale not in SCALES]:
        raise InstructLiteError(f"ratings: no scale '{unknown[0]}'; there are {', '.join(SCALES)}")


def _effects(wanted: bool | SideEffects, judges: Sequence[Judge]) -> SideEffects | None:
    """With the first language model among the judges where no other is named; None: not wanted."""
    if not wanted:
        return None
    options = SideEffects() if isinstance(wanted, bool) else wanted
    options.check()
    asked = next((judge for judge in judges if isinstance(judge, LanguageModelJudge)), None)
    return options if options.judge else replace(options, judge=asked)


def _counted(name: str, rows: list[dict] | None) -> dict[str, Any]:
    return {name: len(rows) if rows else None, f"{name}_sha256": data_hash(rows) if rows else None}


def _chooser(candidates: list[Candidate], reward: Model | None) -> RewardJudge | None:
    """The reward model that best-of-n chooses by, where there is a best-of-n."""
    best = next((candidate for candidate in candidates if candidate.kind == "best-of-n"), None)
    if best is None:
        return None
    if reward is None:
        raise InstructLiteError(
            f"{best.name}: the best by which reward model? Give reward=ADAPTER (--reward), the one that was trained on, never the judge"
        )
    return reward_judge(reward, "chooser")


def _people(votes: Sequence[Mapping[str, Any]], candidates: list[Candidate]) -> list[People]:
    hashes = {c.adapter.sha256 if c.adapter else "": c.name for c in candidates if c.kind in ("base", "adapter")}
    people = People.of(votes, hashes)
    return [people] if people else []


def _shots(candidates: list[Candidate], demonstrations: Source | None) -> list[dict]:
    """Demonstrations for few-shot candidates."""
    shown = next((candidate for candidate in candidates if candidate.kind == "few-shot"), None)
    if shown is None:
        return []
    if demonstrations is None:
        raise InstructLiteError(f"{shown.name}: give demonstrations= (--demonstrations), those that SFT was trained on")
    return read_records(demonstrations, "demonstrations")


def _comparisons(source: Source) -> list[dict]:
    """People's comparisons; of a ranking, its best answer against its worst."""
    found = []
    for row, group in zip(rows := read_records(source), as_groups(rows), strict=True):
        ranked = sorted(zip(group["ranks"], group["responses"], strict=True))
        if ranked[0][0] < ranked[-1][0]:
            found.append({"prompt": row["prompt"], "chosen": ranked[0][1], "rejected": ranked[-1][1]})
    return found[:MOST_COMPARISONS]


def _load(candidates: list[Candidate], judges: Sequence[Judge]) -> RoleModel:
    adapters = {candidate.role: candidate.adapter for candidate in candidates if candidate.role}
    for judge in judges:
        if isinstance(judge, RewardJudge):
            adapters |= dict(zip(judge.roles, judge.members, strict=True))
    if not adapters:
        raise InstructLiteError("candidates: no adapter among candidates and judges says which base it is")
    return RoleModel.load(base_of(next(iter(adapters.values())), BaseOptions()), adapters)


def _prompts(model: RoleModel, rows: list[dict], longest: float, limit: int | None) -> tuple[list[tuple[dict, list[int]]], dict[str, Any]]:
    """The first `limit` different prompts of at most `longest` tokens, and what became of the rows."""
    encoded: dict[tuple[int, ...], dict] = {}
    for row in rows:
        encoded.setdefault(tuple(model.base.encode_prompt(row["prompt"])), row)
    fitting = [(row, list(ids)) for ids, row in encoded.items() if len(ids) <= longest]
    if not fitting:
        shortest = min(map(len, encoded))
        raise InstructLiteError(f"no prompt has at most {longest:g} tokens (the shortest has {shortest}); raise max_prompt_length")
    chosen = fitting[:limit]
    return chosen, {
        "rows": len(rows),
        "repeated": len(rows) - len(encoded),
        "too_long": len(encoded) - len(fitting),
        "prompts": len(chosen),
        "prompts_sha256": data_hash({"prompt": row["prompt"]} for row, _ in chosen),
    }


@contextmanager
def _phase(seconds: dict[str, float], name: str, rows: int = 0, done: int = 0) -> Iterator[Advance]:
    """Notes how long it takes; shows progress where there are rows to count."""
    start = time.perf_counter()
    with progress(f"evaluate: {name}", rows, done) if rows > done else nullcontext(lambda count=1: None) as advance:
        yield advance
    seconds[name] = round(time.perf_counter() - start, 2)
