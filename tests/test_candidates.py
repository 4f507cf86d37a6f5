"""Who answers, from how it is written; and what few-shot and context put into the conversation. No models: a token is a word."""

import json

import pytest

from instructlite.errors import InstructLiteError
from instructlite.evaluation.candidates import Candidate, Prompting, candidates_of
from instructlite.evaluation.runs import all_candidates, in_run, policies


def user(text):
    return {"role": "user", "content": text}


def encode(messages):
    return [f"{turn['role'][0]}:{word}" for turn in messages for word in turn["content"].split()]


DEMONSTRATIONS = [{"prompt": [user(f"ask {i}")], "completion": f"say {i}"} for i in range(6)]
FEW, CONTEXT = Candidate("few-shot:2", "few-shot", n=2), Candidate("context", "context")


def test_few_shot_shows_so_many_demonstrations_before_the_prompt():
    prompting = Prompting(encode, 100, DEMONSTRATIONS)
    ids = prompting.ids(FEW, {"prompt": [user("now")]})
    assert ids == ["u:ask", "u:0", "a:say", "a:0", "u:ask", "u:1", "a:say", "a:1", "u:now"]
    assert prompting.ids(Candidate("base"), {"prompt": [user("now")]}) == ["u:now"]


def test_the_system_prompt_stays_first_and_none_of_a_demonstration_follows_it():
    system = {"role": "system", "content": "Be brief."}
    shown = [{"prompt": [{"role": "system", "content": "Other."}, user("ask")], "completion": "say"}]
    ids = Prompting(encode, 100, shown).ids(FEW, {"prompt": [system, user("now")]})
    assert ids == ["s:Be", "s:brief.", "u:ask", "a:say", "u:now"]


def test_demonstrations_that_do_not_fit_and_the_prompts_own_are_left_out():
    prompting = Prompting(encode, 6, DEMONSTRATIONS)
    assert prompting.ids(FEW, {"prompt": [user("now")]}) == ["u:ask", "u:0", "a:say", "a:0", "u:now"]
    assert prompting.ids(FEW, {"prompt": [user("a much longer prompt now")]}) == encode([user("a much longer prompt now")])
    own = Prompting(encode, 100, DEMONSTRATIONS).ids(FEW, {"prompt": [user("ask 0")]})
    assert own == ["u:ask", "u:1", "a:say", "a:1", "u:ask", "u:2", "a:say", "a:2", "u:ask", "u:0"]


def test_the_seed_chooses_the_demonstrations_and_the_same_for_every_prompt():
    chosen = [Prompting.of(encode, 100, DEMONSTRATIONS, seed).demonstrations for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_context_stands_before_the_last_question_and_is_cut_to_fit():
    row = {"prompt": [user("first"), {"role": "assistant", "content": "yes"}, user("why ?")], "context": "one two three four"}
    whole = ["u:first", "a:yes", "u:one", "u:two", "u:three", "u:four", "u:why", "u:?"]
    assert Prompting(encode, 8, []).ids(CONTEXT, row) == whole
    cut = Prompting(encode, 6, []).ids(CONTEXT, row)
    assert len(cut) <= 6 and cut[:3] == ["u:first", "a:yes", "u:one"] and cut[-2:] == ["u:why", "u:?"]
    assert Prompting(encode, 4, []).ids(CONTEXT, row) == ["u:first", "a:yes", "u:why", "u:?"]
    assert Prompting(encode, 8, []).ids(CONTEXT, {"prompt": row["prompt"]}) == ["u:first", "a:yes", "u:why", "u:?"]


def test_candidates_are_named_as_they_are_written():
    found = candidates_of(["base", "few-shot", "few-shot-2", "context", "best-of-8:base", "base"])
    assert [(one.name, one.kind, one.n, one.of) for one in found] == [
        ("base", "base", None, None),
        ("few-shot:4", "few-shot", 4, None),
        ("few-shot:2", "few-shot", 2, None),
        ("context", "context", None, None),
        ("best-of-8:base", "best-of-n", 8, "base"),
        ("base-2", "base", None, None),
    ]
    assert [one.draws for one in found] == [1, 1, 1, 1, 8, 1]


def test_what_is_no_candidate_is_refused(tmp_path):
    with pytest.raises(InstructLiteError, match="not an InstructLite adapter"):
        candidates_of([str(tmp_path)])
    with pytest.raises(InstructLiteError, match="is written few-shot:4"):
        candidates_of(["few-shot:2:sft"])


@pytest.fixture
def run(tmp_path):
    for name, role in (("sft", "policy"), ("reward", "reward"), ("ppo", "policy"), ("dpo", "policy"), ("ppo-ptx", "policy")):
        (tmp_path / name).mkdir()
        manifest = dict(role=role, base="b", revision=None, fingerprint="f", quantization="none", dtype="float32")
        manifest |= dict(tokenizer_sha256="t", template_sha256="t", format=1)
        (tmp_path / name / "instructlite.json").write_text(json.dumps(manifest))
    return tmp_path


def test_a_run_has_its_policies_with_sft_first_and_ppo_last(run):
    assert policies(run) == ["sft", "dpo", "ppo-ptx", "ppo"]
    assert all_candidates(run) == ["base", "few-shot:4", "sft", "best-of-4", "dpo", "ppo-ptx", "ppo"]


def test_names_of_stages_are_directories_of_the_run_and_others_stay(run):
    assert [in_run(run, name) for name in ("ppo-ptx", "base", "best-of-4:ppo", "me/model")] == [
        str(run / "ppo-ptx"),
        "base",
        "best-of-4:ppo",
        "me/model",
    ]
