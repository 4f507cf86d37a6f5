"""One engine, several adapters, many people: every pane is what it says, every answer belongs to its prompt, and nothing hangs."""


import pytest
import torch
from peft import PeftModel
from test_compare import make_adapter
from transformers import AutoModelForCausalLM, GenerationConfig

from instructlite.config import BaseOptions
from instructlite.models.base import load_base
from instructlite.models.engine import Engine
from instructlite.models.sampling import Sampling

GREEDY = Sampling(max_new_tokens=12, temperature=0)
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


@pytest.fixture
def engine(run):
    with Engine.load(run, BaseOptions(dtype="float32")) as engine:
        yield engine


def plain(run, pane, engine, text, new_tokens=12):
    """What PEFT and transformers alone make of it: the base from its directory, the adapter from its own."""
    model = AutoModelForCausalLM.from_pretrained(engine.model.base.path, dtype=torch.float32)
    if pane != "base":
        model = PeftModel.from_pretrained(model, run / pane)
    base = engine.model.base
    ids = torch.tensor([base.encode_prompt(asked(text))])
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=base.stop_ids, pad_token_id=base.pad_id)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return base.decode(output[0, ids.shape[1] :].tolist())


def as_peft_alone(engine, run, panes=("base", "sft", "dpo", "a.ppo")):
    """Whether every pane says what PEFT alone makes of its adapter."""
    expected = {text: [plain(run, pane, engine, text) for pane in panes] for text in TEXTS}
    assert all(len(set(answers)) == len(panes) for answers in expected.values())  # else a wrong adapter would not be seen
    streams = {text: engine.submit(asked(text), panes, GREEDY) for text in TEXTS}
    return all(streams[text].result().texts == expected[text] for text in TEXTS)


def test_panes_say_what_plain_peft_makes_of_their_adapters(engine, run):
    assert [pane.name for pane in engine.panes] == ["base", "sft", "dpo", "a.ppo"]
    assert as_peft_alone(engine, run)
