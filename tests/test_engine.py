"""One engine, several adapters, many people: every pane is what it says, every answer belongs to its prompt, and nothing hangs."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from peft import PeftModel
from test_compare import make_adapter
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, MistralForCausalLM

from instructlite.config import BaseOptions, Lora
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base, lora_config
from instructlite.models.engine import Engine, Full, Limits
from instructlite.models.lockstep import Lockstep, Row
from instructlite.models.roles import RoleModel
from instructlite.models.sampling import Sampling, generate, score
from instructlite.models.streaming import Stream

GREEDY = Sampling(max_new_tokens=12, temperature=0)
PANES = ("base", "sft", "dpo", "a.ppo")
TEXTS = ("Hi", "Why is the sky blue?", "Name a tree.", "Grüße, 日本")


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    """A run directory: sft, two policies made from it, and a reward adapter."""
    directory = tmp_path_factory.mktemp("run")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    sft = make_adapter(base, directory / "sft", 1)
    make_adapter(base, directory / "dpo", 5, parents={"sft": sft.sha256})
    reward = make_adapter(base, directory / "reward", 3, reward=True, parents={"sft": sft.sha256})
    make_adapter(base, directory / "a.ppo", 2, parents={"sft": sft.sha256, "reward": reward.sha256})
    return directory


@pytest.fixture(scope="module")
def loaded(run):
    return Engine.load(run, BaseOptions(dtype="float32"))


@pytest.fixture
def engine(loaded):
    with Engine(loaded.model, loaded.panes, loaded.rewards) as engine:
        yield engine


@pytest.fixture
def steps(engine, monkeypatch):
    """A semaphore: the engine makes as many steps as it is released."""
    semaphore, step = threading.Semaphore(0), engine._lockstep.step
    monkeypatch.setattr(engine._lockstep, "step", lambda: semaphore.acquire(timeout=60) and step())
    yield semaphore
    semaphore.release(10_000)


def wait_until(holds):
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("waited in vain")


def plain_peft(run, pane, base, dtype=torch.float32):
    """What PEFT and transformers alone make of a directory: the base from its own, the adapter from its own."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    return model if pane == "base" else PeftModel.from_pretrained(model, run / pane)


def plain_answer(model, base, text, new_tokens):
    ids = torch.tensor([base.encode_prompt(asked(text))])
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=base.stop_ids, pad_token_id=base.pad_id)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return base.decode(output[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def plain(run, tiny_path):
    """{text: the answer of each pane by plain PEFT}."""
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    models = [plain_peft(run, pane, base) for pane in PANES]
    answers = {text: [plain_answer(model, base, text, 12) for model in models] for text in TEXTS}
    assert all(len(set(of_panes)) == len(PANES) for of_panes in answers.values())  # else a wrong adapter would not be seen
    return answers


# --- panes are what they say ------------------------------------------------------------------------------------------------


def answers(engine):
    streams = {text: engine.submit(asked(text), PANES, GREEDY) for text in TEXTS}
    return {text: stream.result().texts for text, stream in streams.items()}


def test_panes_say_what_plain_peft_makes_of_their_adapters(engine, plain):
    assert [pane.name for pane in engine.panes] == list(PANES)  # each behind those it was made from
    assert answers(engine) == plain


@pytest.mark.parametrize("wrong", ["swapped", "missing", "all the same"])
def test_a_pane_with_another_adapter_is_seen(wrong, engine, plain):
    base, sft, dpo, ppo = engine.panes
    engine.panes = {
        "swapped": [base, replace(sft, role=dpo.role), replace(dpo, role=sft.role), ppo],
        "missing": [base, sft, replace(dpo, role=None), ppo],
        "all the same": [replace(pane, role=ppo.role) for pane in engine.panes],
    }[wrong]
    assert answers(engine) != plain


def test_a_pane_tells_what_it_is(engine, run):
    base, sft, _, ppo = engine.panes
    assert base.sha256 is None and "adapter" not in base.facts
    assert sft.sha256 in (run / "sft" / "instructlite.json").read_text()
    assert ppo.facts["from sft"] == sft.sha256[:12] and ppo.facts["precision"] == "float32"


def test_a_damaged_adapter_is_not_shown(run, tmp_path):
    for name in ("sft", "dpo"):
        (tmp_path / name).mkdir()
        for file in (run / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "dpo" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InstructLiteError, match="damaged or changed"):
        Engine.load(tmp_path, BaseOptions(dtype="float32"))


def test_what_cannot_answer_or_mix_is_refused(run, tiny_base, tmp_path):
    with pytest.raises(InstructLiteError, match="no adapters in this directory"):
        Engine.load(tmp_path)
    with pytest.raises(InstructLiteError, match="no adapter that answers"):
        Engine.load([run / "reward"])
    config = lora_config(Lora(r=4, alpha=8), tiny_base.model, "CAUSAL_LM")
    config.use_dora = True
    RoleModel.load(tiny_base, {"policy": config}).save_role("policy", tmp_path / "dora")
    with pytest.raises(InstructLiteError, match="DoRA"):
        Engine.load(tmp_path, BaseOptions(dtype="float32"))


def test_in_bfloat16_every_token_is_the_likeliest_up_to_rounding(run):
    """Which of two tokens that are all but equally likely comes first may differ from PEFT alone: it adds adapters after rounding."""
    with Engine.load(run, BaseOptions(dtype="bfloat16")) as engine:
        stream = engine.submit(asked("Why?"), PANES, replace(GREEDY, max_new_tokens=24))
        stream.result()
        prompt = engine.model.base.encode_prompt(asked("Why?"))
        for pane, row in zip(PANES, stream.rows, strict=True):
            for other in PANES:
                logits = plain_peft(run, other, engine.model.base, torch.bfloat16)(torch.tensor([prompt + row.ids])).logits[0].float()
                before = logits[len(prompt) - 1 : -1]
                behind = before.amax(-1) - before.gather(1, torch.tensor(row.ids)[:, None])[:, 0]
                assert (behind.max() < 0.05 * before.std()) == (other == pane)


# --- rows depend on themselves only -----------------------------------------------------------------------------------------


def test_an_answer_depends_on_no_neighbour(engine):
    """Alone; and in a full batch of other lengths, adapters, samplings and seeds that come and go."""
    mine = Sampling(max_new_tokens=20, temperature=0.9, top_p=0.95)
    alone = engine.submit(asked("Name a tree."), PANES, mine, seed=7).result().texts
    others = [
        engine.submit(asked("x" * n), PANES[: 1 + n % 4], Sampling(max_new_tokens=4 + n % 5, temperature=n % 3, top_k=n), seed=n)
        for n in range(1, 9)
    ]
    again = engine.submit(asked("Name a tree."), PANES[::-1], mine, seed=7)
    others += [engine.submit(asked("y" * n), ["dpo"], Sampling(max_new_tokens=9, temperature=2.0), seed=n) for n in range(40, 45)]
    assert again.result().texts == alone[::-1]
    assert len({tuple(other.result().texts) for other in others}) == len(others)


def test_seeds_and_samplings_are_each_their_own(engine):
    hot = Sampling(max_new_tokens=12, temperature=1.0)
    texts = engine.submit(asked("Hi"), ["sft"] * 4, hot, seed=[1, 2, 1, 3]).result().texts
    assert texts[0] == texts[2] and len(set(texts)) == 3
    first = engine.submit(asked("Hi"), ["sft"], replace(hot, top_k=1)).result().texts
    assert first == engine.submit(asked("Hi"), ["sft"], GREEDY).result().texts


def test_panes_grow_in_step_and_end_on_their_own(engine):
    lengths = {}
    for snapshot in engine.submit(asked("Name a tree."), PANES, Sampling(max_new_tokens=40, temperature=1.0), seed=3):
        growing = {n for n, finish in zip(snapshot.tokens, snapshot.finish, strict=True) if finish is None}
        assert len(growing) <= 1
        for pane, n, finish in zip(PANES, snapshot.tokens, snapshot.finish, strict=True):
            if finish:
                assert lengths.setdefault(pane, n) == n
    assert set(lengths) == set(PANES) and all(speed > 0 for speed in snapshot.tokens_per_second)


def test_conversations_may_differ_from_pane_to_pane(engine, plain):
    texts = ("Hi", "Name a tree.")
    result = engine.submit([asked(text) for text in texts], ["sft", "dpo"], GREEDY).result()
    assert result.texts == [plain["Hi"][1], plain["Name a tree."][2]]


def test_half_a_character_is_not_shown(tiny_base):
    ids = tiny_base.encode_completion("日本")[:-1]
    assert len(ids) == 6
    row = Row([1], None, GREEDY, 0)
    stream, shown = Stream([row], tiny_base, threading.Lock()), []
    for token in ids:
        row.ids.append(token)
        stream.advance()
        shown += stream.snapshot().texts
    assert shown == ["", "", "日", "日", "日", "日本"]


def test_windows_of_attention_and_late_joiners(tmp_path):
    """Layers that look back 8 tokens only; rows of unlike lengths join and leave between steps."""
    torch.manual_seed(0)
    config = {key: value for key, value in tiny_config().to_dict().items() if key not in ("model_type", "architectures")}
    model = MistralForCausalLM(MistralConfig(**config | {"sliding_window": 8}))
    model.lm_head.weight.data.mul_(12)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype="float32", chat_template="chatml")
    model = RoleModel.load(base, {"policy": lora_config(Lora(r=4, alpha=8), base.model, "CAUSAL_LM")})
    for parameter in model.role_parameters("policy"):
        parameter.data.normal_(std=0.15)
    prompts, roles = [[1, *range(70, 70 + n)] for n in (30, 3, 17, 9)], ["policy", None, None, "policy"]
    samplings = [Sampling(max_new_tokens=n, temperature=0) for n in (6, 20, 14, 18)]
    rows = [Row(prompt, role, sampling, 0) for prompt, role, sampling in zip(prompts, roles, samplings, strict=True)]
    lockstep = Lockstep(model)
    for joining in (rows[:2], rows[2:3], rows[3:]):
        lockstep.join(lockstep.prefill(joining))
        for _ in range(4):
            lockstep.step()
            lockstep.keep([row for row in lockstep.rows if row.finish is None])
    while lockstep.rows:
        lockstep.step()
        lockstep.keep([row for row in lockstep.rows if row.finish is None])
    expected = [generate(model, [row.prompt], row.role, row.sampling)[0] for row in rows]
    assert [row.ids for row in rows] == expected and len({len(row.ids) for row in rows}) == 4


# --- many at once -----------------------------------------------------------------------------------------------------------


def test_a_hundred_clients_get_their_own_answers_and_leave_nothing_behind(engine):
    engine.limits = Limits(waiting=16, rows=12)
    texts = [f"Say {n} " + "again " * (n % 7) for n in range(100)]
    prompts = [engine.model.base.encode_prompt(asked(text)) for text in texts]
    roles = {pane.name: pane.role for pane in engine.panes}
    panes = [PANES[n % 4] for n in range(100)]
    ids = generate(engine.model, prompts, [roles[pane] for pane in panes], GREEDY)
    expected = [engine.model.base.decode(answer) for answer in ids]
    refused, start = [], threading.Barrier(100)

    def client(n):
        start.wait()
        while True:
            try:
                return engine.submit(asked(texts[n]), [panes[n]], GREEDY).result().texts[0]
            except Full as full:
                refused.append(str(full))
                time.sleep(0.05)

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    engine.submit(asked("Hi"), PANES, GREEDY).result()  # adapters are copied for mixed batches once
    wait_until(lambda: not engine._turning)
    before = tensors()
    with ThreadPoolExecutor(100) as clients:
        assert list(clients.map(client, range(100))) == expected
    assert refused and refused[0] == "busy: 16 requests are waiting already; try again in a moment"
    wait_until(lambda: not engine._turning)
    assert engine._lockstep.batch is None and not engine._running and not engine._waiting
    assert tensors() <= before


def test_who_waits_sees_how_many_are_ahead(engine, steps):
    engine.limits = Limits(waiting=3, rows=2)
    running = engine.submit(asked("Hi"), ["base", "sft"], GREEDY)
    wait_until(lambda: not running.snapshot().waiting)
    waiting = [engine.submit(asked("Hi"), ["base", "sft"], GREEDY) for _ in range(3)]
    assert [stream.snapshot().position for stream in waiting] == [0, 1, 2]
    with pytest.raises(Full):
        engine.submit(asked("Hi"), ["base"], GREEDY)
    waiting[0].cancel()
    steps.release(1)
    wait_until(lambda: waiting[2].snapshot().position == 1)
    assert waiting[0].result().finish == ["cancelled", "cancelled"]
    steps.release(10_000)
    assert waiting[2].result().texts == running.result().texts


def test_nobody_listens_and_nothing_more_is_computed(engine, steps):
    stream = engine.submit(asked("Hi"), PANES, Sampling(max_new_tokens=400, temperature=1.0))
    steps.release(3)
    for snapshot in stream:
        if snapshot.tokens[0] >= 2:
            break
    wait_until(lambda: engine._turning)
    steps.release(2)
    wait_until(lambda: not engine._turning)
    assert max(len(row.ids) for row in stream.rows) <= 6
    assert stream.snapshot().finish == ["cancelled"] * 4
    steps.release(100)
    assert engine.submit(asked("Hi"), ["base"], GREEDY).result().tokens[0] > 0


def test_a_stopped_answer_stays_as_it_is(engine, steps):
    stream = engine.submit(asked("Hi"), ["base"], Sampling(max_new_tokens=400, temperature=1.0))
    steps.release(2)
    wait_until(lambda: stream.snapshot().tokens == [3])
    stream.cancel()
    steps.release(1)
    *_, last = stream
    assert last.finish == ["cancelled"] and last.tokens[0] in (3, 4)


# --- what goes wrong ----------------------------------------------------------------------------------------------------------


def test_an_error_in_a_step_reaches_who_waits_for_it_and_the_next_is_answered(engine, plain, monkeypatch):
    step, calls = engine._lockstep.step, []

    def fails_once():
        calls.append(0)
        if len(calls) == 5:
            raise RuntimeError("out of something, in /a/secret/path")
        step()

    monkeypatch.setattr(engine._lockstep, "step", fails_once)
    streams = [engine.submit(asked("Hi"), ["base"], GREEDY) for _ in range(2)]
    for stream in streams:
        with pytest.raises(InstructLiteError, match="broke off") as error:
            stream.result()
        assert "secret" not in str(error.value)
    assert engine.submit(asked("Hi"), PANES, GREEDY).result().texts == plain["Hi"]


def test_an_error_in_a_prompt_is_no_concern_of_those_being_answered(engine, plain, steps, monkeypatch):
    running = engine.submit(asked("Hi"), PANES, GREEDY)
    wait_until(lambda: not running.snapshot().waiting)
    monkeypatch.setattr(engine._lockstep, "prefill", lambda rows: 1 / 0)
    unlucky = engine.submit(asked("Why?"), ["sft"], GREEDY)
    steps.release(100)
    with pytest.raises(InstructLiteError, match="ZeroDivisionError"):
        unlucky.result()
    assert running.result().texts == plain["Hi"]


def test_scores_that_are_no_numbers_end_their_own_answer_only(engine, plain):
    weight = engine.model.role_parameters(engine.panes[1].role)[-1].data
    sound = weight.clone()
    weight.fill_(torch.nan)
    streams = [engine.submit(asked("Hi"), [pane], GREEDY) for pane in ("base", "sft", "dpo")]
    with pytest.raises(InstructLiteError, match="no numbers"):
        streams[1].result()
    weight.copy_(sound)
    assert [streams[0].result().texts[0], streams[2].result().texts[0]] == [plain["Hi"][0], plain["Hi"][2]]


def test_closing_ends_every_wait(engine, steps):
    engine.limits = Limits(rows=1)
    streams = [engine.submit(asked("Hi"), ["base"], GREEDY) for _ in range(2)]
    steps.release(1)
    threading.Timer(0.1, steps.release, [1]).start()
    engine.close()
    for stream in streams:
        with pytest.raises(InstructLiteError, match="stopping"):
            stream.result()
    with pytest.raises(InstructLiteError, match="stopping"):
        engine.submit(asked("Hi"), ["base"])


@pytest.mark.parametrize(
    "conversation, panes, options, message",
    [
        (asked("x" * 300), ["base"], {}, "300 characters, at most 200"),
        (asked("日" * 60), ["base"], {}, "tokens, at most 100"),
        (asked("Hi"), ["base"], {"sampling": Sampling(max_new_tokens=51)}, "max_new_tokens=51: at most 50"),
        (asked("Hi"), ["secret"], {}, "no pane 'secret'"),
        (asked("Hi"), [], {}, "0 answers"),
        (asked("Hi"), ["base"] * 25, {}, "25 answers"),
        ([asked("Hi")] * 2, ["base"] * 3, {}, "2 conversations for 3 panes"),
        (asked("Hi" * 60), ["base"], {}, "tokens, at most 100"),
        (asked("Hi"), ["base"], {"seed": -1}, "seed"),
        (asked("Hi"), ["base"], {"seed": [1, 2]}, "seed"),
        ("Hi", ["base"], {}, "a list of messages"),
        (asked(7), ["base"], {}, "expected a text"),
        (asked("\ud800"), ["base"], {}, "half of a character"),
        ([], ["base"], {}, "no messages"),
        ([*asked("Hi"), {"role": "assistant", "content": "Yo"}], ["base"], {}, "expected one of the user"),
        ([{"role": "tool", "content": "x"}], ["base"], {}, "unknown role"),
    ],
)
def test_what_is_no_question_is_refused_before_it_waits(conversation, panes, options, message, engine):
    engine.limits = Limits(characters=200, prompt_tokens=100, new_tokens=50)
    with pytest.raises(InstructLiteError, match=message):
        engine.submit(conversation, panes, **options)
    assert not engine._waiting


def test_control_tokens_of_users_stay_text(engine):
    ids = engine.submit(asked("<|im_end|>"), ["base"], GREEDY).rows[0].prompt
    assert ids.count(engine.model.base.end_id) == 1  # the template's own


def test_scoring_that_fails_is_told_without_details(engine, plain, monkeypatch):
    monkeypatch.setattr(engine.model, "scores", lambda *_: 1 / 0)
    with pytest.raises(InstructLiteError, match=r"scoring broke off \(ZeroDivisionError\); try again"):
        engine.score(asked("Hi"), ["Yo"])
    assert engine.submit(asked("Hi"), PANES, GREEDY).result().texts == plain["Hi"]


# --- scores -----------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_reward_adapter_while_others_are_answered(engine, plain):
    streams = [engine.submit(asked(text), PANES, GREEDY) for text in TEXTS]
    given = engine.score(asked("Hi"), plain["Hi"] * 3)
    base = engine.model.base
    sequences = [(base.encode_prompt(asked("Hi")), base.encode_completion(text)) for text in plain["Hi"]]
    assert list(given) == ["reward"] and len(given["reward"]) == 12
    assert [stream.result().texts for stream in streams] == list(plain.values())
    wait_until(lambda: not engine._turning)
    assert given["reward"][:4] == pytest.approx(score(engine.model, ["reward0"], sequences)[0].tolist(), abs=1e-5)


def test_without_a_reward_adapter_there_are_no_scores(run):
    with Engine.load([run / "sft"], BaseOptions(dtype="float32")) as engine:
        assert engine.score(asked("Hi"), ["Yo"]) == {}
