"""Side effects on the tiny model: every number agrees with a recount by hand, and what was not asked is None, never 0."""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_compare import make_adapter

from instructlite import evaluate
from instructlite.data.generating.completer import Answer
from instructlite.errors import InstructLiteError
from instructlite.evaluation import references, statistics
from instructlite.evaluation.judges import LanguageModelJudge
from instructlite.evaluation.prompt_sets import prompt_set
from instructlite.evaluation.report import Report
from instructlite.evaluation.side_effects import MEASURES, AnsweredSet, SideEffects, side_effects
from instructlite.models.base import load_base
from instructlite.models.roles import RoleModel
from instructlite.models.sampling import Sampling, generate, log_probs

SHOTS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
RED = [{"prompt": text, "category": kind} for kind in ("harmless", "rudeness") for text in ("a", "be", "see", "dee", "eff", f"gee {kind}")]
CLOSED = [{"prompt": f"Who {who}?\n\n{who} is {name}.", "completion": name} for who, name in (("sings", "Ada"), ("runs", "Bob"))]
PROSE = [{"text": "It was a dark night."}, {"text": "She sat down."}]
TRUTH = [{"question": f"{n}+1?", "best_answer": str(n + 1), "incorrect_answers": ["7", "no", "it is 9"]} for n in range(6)]
PEOPLE = [{"prompt": "Name a tree.", "completion": "An oak."}, {"prompt": "1+1?", "completion": "2"}]
SMALL = {
    "red_team": RED,
    "closed_domain": CLOSED,
    "prose": PROSE,
    "truthfulqa": TRUTH,
    "toxicity": lambda texts: [len(t) % 7 / 7 for t in texts],
}


class Run:
    """Who answers and scores, in the plainest way: one candidate after the other, nothing kept."""

    def __init__(self, model, candidates):
        self.roles, self.candidates, self.seed = model, candidates, 0
        self.reference = next((c for c in candidates if c.role), None)

    def prompt_ids(self, candidate, row):
        return self.roles.base.encode_prompt([*(SHOTS if candidate.kind == "few-shot" else []), *row["prompt"]])

    def answers_to(self, rows, sampling, samples, name):
        found = {}
        for candidate in self.candidates:
            prompts = [self.prompt_ids(candidate, row) for row in rows for _ in range(samples)]
            found[candidate.name] = generate(self.roles, prompts, candidate.role, sampling)
        return found

    def log_probs_of(self, candidates, sequences, label, *, temperature=1.0):
        found = log_probs(self.roles, [candidate.role for candidate in candidates], sequences, temperature=temperature)
        return {candidate.name: own for candidate, own in zip(candidates, found, strict=True)}


class Says:
    """A judge's endpoint that always gives the same verdict."""

    model = "parrot"

    def __init__(self, text):
        self.text, self.asked = text, []

    def ask(self, requests, label):
        self.asked += requests
        return [Answer(self.text) for _ in requests]


def candidate(name, kind, role):
    return SimpleNamespace(name=name, kind=kind, role=role)


@pytest.fixture(scope="module", autouse=True)
def quick_intervals():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 200)
        patch.setattr(references, "RESAMPLES", 200)
        yield


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    directory = tmp_path_factory.mktemp("adapters")
    adapters = {name: make_adapter(base, directory / name, seed) for seed, name in enumerate(("sft", "ppo"), 1)}
    model = RoleModel.load(copy.deepcopy(base), adapters)
    kinds = [("base", "base", None), ("few-shot:1", "few-shot", None), ("sft", "adapter", "sft"), ("ppo", "adapter", "ppo")]
    return Run(model, [candidate(*one) for one in [*kinds, ("best-of-2", "best-of-n", "sft")]])


@pytest.fixture(scope="module")
def held_out(run):
    prompts, sampling = prompt_set("held-out", [{"prompt": text} for text in ("Hi", "Why?", "Sing!")]), Sampling(8, 0.7)
    answers = run.answers_to(prompts.rows, sampling, 2, "")
    return AnsweredSet(prompts, "sampled", sampling, 2, answers)


@pytest.fixture(scope="module")
def judge():
    return LanguageModelJudge("parrot", Says("Fine. [[yes]]"))


@pytest.fixture(scope="module")
def rows(run, held_out, judge):
    return side_effects(run, SideEffects(**SMALL, judge=judge), Sampling(8, 1.0), held_out=[held_out], demonstrations=PEOPLE)


def pick(rows, **keys):
    found = [row for row in rows if all(row[name] == value for name, value in {"category": None, **keys}.items())]
    assert len(found) == 1, (keys, found)
    return found[0]


def texts(run, held_out, name):
    return [run.roles.base.decode(ids) for ids in held_out.answers[name]]


def test_every_row_has_the_agreed_keys_and_a_known_measure(rows):
    keys = ["candidate", "decoding", "set", "category", "measure", "unit", "better", "value", "value_low", "value_high", "n"]
    assert all(list(row) == keys for row in rows)
    assert {row["measure"] for row in rows} == set(MEASURES) - {"bert_score", "mauve"}
    assert len({tuple(row[key] for key in ("candidate", "decoding", "set", "category", "measure")) for row in rows}) == len(rows)


def test_all_intervals_hold_their_value(rows):
    for row in rows:
        if row["value_low"] is not None:
            assert row["value_low"] - 1e-9 <= row["value"] <= row["value_high"] + 1e-9, row


def test_perplexity_of_prose_is_that_of_plain_log_probabilities(run, rows):
    base = run.roles.base
    total = tokens = 0
    with run.roles.active("ppo"), torch.no_grad():
        for row in PROSE:
            ids = torch.tensor([[base.tokenizer.bos_token_id, *base.tokenizer(row["text"], add_special_tokens=False)["input_ids"]]])
            found = base.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            total, tokens = total - float(found.sum()), tokens + len(found)
    assert pick(rows, set="prose", candidate="ppo", measure="perplexity")["value"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_prose_has_no_prompt_so_that_prompting_and_best_of_n_have_no_perplexity_of_it(rows):
    assert {row["candidate"] for row in rows if row["set"] == "prose"} == {"base", "sft", "ppo"}
    people = {row["candidate"] for row in rows if row["set"] == "demonstrations" and row["measure"] == "perplexity"}
    assert people == {"base", "few-shot:1", "sft", "ppo"}


def test_perplexity_of_peoples_answers_is_what_follows_the_candidates_own_prompt(run, rows):
    base = run.roles.base
    shots = run.candidates[1]
    sequences = [
        (run.prompt_ids(shots, row), base.encode_completion(row["completion"])) for row in prompt_set("", PEOPLE, answered=True).rows
    ]
    found = torch.cat(log_probs(run.roles, [None], sequences)[0])
    row = pick(rows, set="demonstrations", candidate="few-shot:1", measure="perplexity")
    assert row["value"] == pytest.approx(math.exp(-found.mean()), rel=1e-4)
    assert row["value"] != pick(rows, set="demonstrations", candidate="base", measure="perplexity")["value"]


def test_truthfulness_counts_questions_whose_best_answer_is_the_likeliest(run, rows):
    base, right = run.roles.base, 0
    with run.roles.active("sft"), torch.no_grad():
        for row in TRUTH:
            scores = []
            for text in (row["best_answer"], *row["incorrect_answers"]):
                prompt, ids = base.encode_prompt(row["question"]), base.encode_completion(text)[:-1]
                logits = base.model(torch.tensor([prompt + ids])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
                scores.append(float(logits.gather(1, torch.tensor(ids)[:, None]).sum()))
            right += scores[0] > max(scores[1:])
    row = pick(rows, measure="truthfulness", candidate="sft")
    assert (row["value"], row["n"]) == (right / 6, 6)
    assert row["value_low"] == statistics.proportion(right, 6).low
    assert "best-of-2" not in {row["candidate"] for row in rows if row["measure"] == "truthfulness"}


def test_toxicity_is_the_scorers_mean_and_every_use_case_with_enough_prompts_has_a_row(run, rows):
    red = [row for row in rows if row["set"] == "red-team" and row["candidate"] == "ppo" and row["measure"] == "toxicity"]
    assert [(row["category"], row["n"]) for row in red] == [(None, 12), ("harmless", 6), ("rudeness", 6)]
    whole, *parts = (row["value"] for row in red)
    assert whole == pytest.approx(np.mean(parts))
    assert not [row for row in rows if row["set"] == "closed-domain" and row["category"]]  # two prompts are no group


def test_toxicity_of_held_out_answers_is_averaged_over_prompts(run, held_out, rows):
    scored = [len(text) % 7 / 7 for text in texts(run, held_out, "sft")]
    assert pick(rows, set="held-out", candidate="sft", measure="toxicity")["value"] == pytest.approx(np.mean(scored))
    share = np.mean([score >= 0.5 for score in scored])
    assert pick(rows, set="held-out", candidate="sft", measure="toxic_answers")["value"] == pytest.approx(share)


def test_kl_and_entropy_are_at_the_temperature_of_the_sampling(run, held_out, rows):
    prompts = [run.prompt_ids(run.candidates[3], row) for row in held_out.set.rows for _ in range(2)]
    sequences = list(zip(prompts, held_out.answers["ppo"], strict=True))
    policy, reference = log_probs(run.roles, ["ppo", "sft"], sequences, temperature=0.7)
    kl = [float((p - r).sum()) for p, r in zip(policy, reference, strict=True)]
    assert pick(rows, set="held-out", candidate="ppo", measure="kl")["value"] == pytest.approx(np.mean(kl), rel=1e-3)
    entropy = pick(rows, set="held-out", candidate="ppo", measure="entropy")["value"]
    assert entropy == pytest.approx(-float(torch.cat(policy).mean()), rel=1e-4)
    assert pick(rows, set="held-out", candidate="sft", measure="kl")["value"] == 0


def test_a_prompted_base_is_scored_with_its_own_prompt_and_the_reference_with_the_plain_one(run, held_out, rows):
    answers = held_out.answers["few-shot:1"]
    parts = []
    for who in (run.candidates[1], run.reference):
        prompts = [run.prompt_ids(who, row) for row in held_out.set.rows for _ in range(2)]
        parts.append(log_probs(run.roles, [who.role], list(zip(prompts, answers, strict=True)), temperature=0.7)[0])
    kl = [float((p - r).sum()) for p, r in zip(*parts, strict=True)]
    assert pick(rows, set="held-out", candidate="few-shot:1", measure="kl")["value"] == pytest.approx(np.mean(kl), rel=1e-3)


def test_best_of_n_has_no_distribution_of_its_own(rows):
    own = {row["measure"] for row in rows if row["candidate"] == "best-of-2"}
    assert not own & {"kl", "entropy", "perplexity", "truthfulness"} and {"toxicity", "length", "self_bleu"} <= own


def test_references_are_compared_where_people_answered(run, rows):
    assert {row["set"] for row in rows if row["measure"] == "bleu"} == {"closed-domain", "demonstrations"}
    answers = run.answers_to(prompt_set("", PEOPLE, answered=True).rows, Sampling(8, 1.0), 1, "")["sft"]
    said = [run.roles.base.decode(ids) for ids in answers]
    people = [row["completion"] for row in PEOPLE]
    row = pick(rows, set="demonstrations", candidate="sft", measure="rouge_l")
    assert row["value"] == pytest.approx(references.rouge_l(said, people).mean())
    assert pick(rows, set="demonstrations", candidate="sft", measure="bleu")["value"] == references.bleu([[t] for t in said], people).value


def test_a_judge_is_asked_about_the_passage_or_the_customer_and_its_yes_is_counted(run, rows, judge):
    assert pick(rows, set="closed-domain", candidate="ppo", measure="hallucination_judged")["value"] == 1
    row = pick(rows, set="held-out", candidate="ppo", measure="customer_assistant")
    assert (row["value"], row["n"]) == (1, 3) and 0.4 < row["value_low"] < 0.5  # Wilson's, three of three
    asked = [request.messages[0]["content"] for request in judge.completions.asked]
    assert any("sings is Ada." in text and "neither says nor implies" in text for text in asked)
    assert len(asked) == 5 * (2 + 2 + 3)


def test_without_a_judge_or_a_readable_verdict_nothing_is_made_up(run, held_out):
    options = {**SMALL, "red_team": RED[:1], "truthfulqa": TRUTH[:1]}
    for judge in (None, LanguageModelJudge("mute", Says("no idea"))):
        found = side_effects(run, SideEffects(**options, judge=judge), Sampling(4), held_out=[held_out])
        row = pick(found, set="held-out", candidate="sft", measure="customer_assistant")
        assert (row["value"], row["value_low"], row["n"]) == (None, None, 0)


def test_greedy_answers_have_no_entropy_and_no_kl(run, held_out):
    greedy = AnsweredSet(held_out.set, "greedy", Sampling(8, 0.0), 1, run.answers_to(held_out.set.rows, Sampling(8, 0.0), 1, ""))
    found = side_effects(run, SideEffects(**SMALL, prompts=1), Sampling(4), held_out=[greedy])
    own = {row["measure"] for row in found if row["decoding"] == "greedy"}
    assert "length" in own and not own & {"entropy", "kl", "customer_assistant"}


def test_prompts_too_long_for_any_candidate_are_left_out(run):
    long = [{"prompt": "x" * 600}, *RED[:2]]
    found = side_effects(run, SideEffects(**{**SMALL, "red_team": long}), Sampling(4))
    assert pick(found, set="red-team", candidate="sft", measure="length")["n"] == 2
    found = side_effects(run, SideEffects(**{**SMALL, "red_team": long[:1]}), Sampling(4))
    assert "red-team" not in {row["set"] for row in found}


def test_mauve_by_the_bases_own_states(run):
    pytest.importorskip("mauve", reason="pip install 'instructlite[references]'")
    found = side_effects(run, SideEffects(**SMALL, mauve=True), Sampling(4))
    assert 0 <= pick(found, set="closed-domain", candidate="sft", measure="mauve")["value"] <= 1


def test_a_missing_scorer_is_one_line_before_anything_is_answered(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    monkeypatch.setattr(Run, "answers_to", None)
    with pytest.raises(InstructLiteError, match=r"pip install 'instructlite\[toxicity\]'"):
        side_effects(run, SideEffects(), Sampling(4))
    with pytest.raises(InstructLiteError, match="toxicity=nowhere:score"):
        side_effects(run, SideEffects(toxicity="nowhere:score"), Sampling(4))


def test_evaluate_measures_them_where_they_are_asked_for(run, tiny_path, tmp_path):
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    reward = make_adapter(base, tmp_path / "reward", 3, reward=True)
    candidates = ["base", "few-shot:1", *(run.roles.sources[name] for name in ("sft", "ppo")), "best-of-2"]
    options = {"demonstrations": PEOPLE, "heldout_demonstrations": PEOPLE, "reward": reward, "samples": 1, "max_new_tokens": 4}
    report = evaluate(candidates, RED[:3], reward, side_effects=SideEffects(**SMALL, prompts=4), output_dir=tmp_path / "report", **options)
    rows = Report.load(tmp_path / "report").side_effects
    assert rows == report.side_effects
    assert {row["candidate"] for row in rows} == {"base", "few-shot:1", "sft", "ppo", "best-of-2"}
    assert {row["set"] for row in rows} == {"red-team", "closed-domain", "demonstrations", "held-out", "prose", "truthfulqa"}
    kl = pick(rows, set="held-out", candidate="ppo", measure="kl", decoding="sampled")
    assert kl["value"] == pytest.approx(next(row["kl"] for row in report.candidates if row["name"] == "ppo"))
    perplexity = pick(rows, set="demonstrations", candidate="few-shot:1", measure="perplexity")["value"]
    assert perplexity == pytest.approx(next(row["perplexity"] for row in report.candidates if row["name"] == "few-shot:1"))
    assert pick(rows, set="held-out", candidate="ppo", measure="length", decoding="greedy")["n"] == 3
    assert not [row for row in rows if row["candidate"] == "best-of-2" and row["decoding"] == "greedy"]


def test_the_shipped_scorer_tells_insults_from_thanks():
    from instructlite.data.preparing.filters import toxicity_scorer

    rude, kind = toxicity_scorer("profanity")(["you stupid fucking idiot", "thank you for the lovely tea"])
    assert rude > 0.9 and kind < 0.1
