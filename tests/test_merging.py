"""merge: one model that computes what base and adapter do, or none."""

import json

import pytest
import torch
from peft import PeftModel
from test_compare import make_adapter
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructlite import cli
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base
from instructlite.models.manifest import NAME
from instructlite.sharing import merging
from instructlite.sharing.merging import merge


@pytest.fixture(scope="module")
def adapter(tiny_path, tmp_path_factory):
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    return make_adapter(base, tmp_path_factory.mktemp("run") / "ppo", 1)


def test_the_merged_model_computes_what_plain_peft_does_without_adapters(adapter, tiny_path, tmp_path):
    found = merge(adapter, tmp_path / "whole")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    ids = torch.tensor([list(range(10, 60))])
    plain = base(ids).logits
    both = PeftModel.from_pretrained(base, adapter.path)(ids).logits
    assert_close(merged(ids).logits, both, atol=1e-3, rtol=1e-4)
    assert (both - plain).abs().max() > 0.1
    assert found.largest_logit_difference < 1e-3
    assert found.same_best_token == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter.path).chat_template
    record = json.loads((tmp_path / "whole" / "merged.json").read_text())
    assert record["adapter_sha256"] == adapter.sha256
    assert {path.name for path in tmp_path.iterdir()} == {"whole"}


def test_the_command_says_how_close_it_came_and_that_4_bit_was_left_behind(adapter, tmp_path, capsys):
    manifest = adapter.path / NAME
    before = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(before) | {"quantization": "nf4", "dtype": "bfloat16"}))
    try:
        cli.main(["merge", str(adapter.path), str(tmp_path / "whole")])
    except SystemExit as end:
        assert not end.code
    finally:
        manifest.write_text(before)
    said = capsys.readouterr().out
    assert "was trained on a base in nf4" in said and "in bfloat16" in said
    assert "KL" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").dtype == torch.bfloat16


def test_a_merge_that_computes_something_else_writes_nothing(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "MOST_KL", -1.0)
    with pytest.raises(InstructLiteError, match="computes something else"):
        merge(adapter, tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_and_reward_adapters_are_refused(adapter, tiny_path, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "mine.txt").touch()
    with pytest.raises(InstructLiteError, match="exists"):
        merge(adapter, tmp_path / "whole")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    reward = make_adapter(base, tmp_path / "reward", 3, reward=True)
    with pytest.raises(InstructLiteError, match="only policies are merged"):
        merge(reward, tmp_path / "other")
