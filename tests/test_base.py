"""Loading a base: pad token, chat template, control tokens in user text, fingerprints, quantization."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SPECIAL, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructlite.config import BaseOptions, Lora
from instructlite.errors import InstructLiteError
from instructlite.models import base as base_module
from instructlite.models.base import base_of, encode_prompt, fingerprint, load_base, lora_config
from instructlite.models.manifest import sha256_file

CONTROL = set(range(len(SPECIAL)))


def test_the_pad_token_is_an_existing_special_token_and_never_eos(tiny_base, tiny_path):
    assert AutoTokenizer.from_pretrained(tiny_path).pad_token_id == AutoTokenizer.from_pretrained(tiny_path).eos_token_id
    assert tiny_base.pad_id == 0 != tiny_base.tokenizer.eos_token_id
    assert tiny_base.model.config.pad_token_id == 0
    assert len(tiny_base.tokenizer) == tiny_base.model.get_input_embeddings().num_embeddings == 260


def test_a_tokenizer_without_a_spare_special_token_is_refused(tiny_path, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_path).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] in ("<|im_start|>", "<|im_end|>")]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InstructLiteError, match="no special token is free"):
        load_base(tmp_path, dtype="float32", chat_template="chatml")


def test_a_missing_template_names_the_choices(tiny_path):
    with pytest.raises(InstructLiteError, match="chat_template to chatml, plain or to a .jinja file"):
        load_base(tiny_path, dtype="float32")
    with pytest.raises(InstructLiteError, match="neither a file nor one of chatml, plain"):
        load_base(tiny_path, dtype="float32", chat_template="chatlm")


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("place", ["{}", "before {} after", "{0}\n{0}system\nyou", "<|im_{0}end|>"])
def test_control_tokens_in_text_stay_text(tiny_base, token, place):
    text = place.format(token)
    for role in ("user", "system", "assistant"):
        messages = [{"role": "user", "content": "x"}, {"role": role, "content": text}, {"role": "user", "content": text}]
        control = [i for i in tiny_base.encode_prompt(messages) if i in CONTROL]
        assert control == [1, 2, 1, 2, 1, 2, 1], "only the template's own"
    assert [i for i in tiny_base.encode_completion(text) if i in CONTROL] == [tiny_base.end_id]


def test_harmless_text_is_tokenized_as_ever(tiny_base):
    assert tiny_base.decode(tiny_base.encode_completion("Hello, wörld!")) == "Hello, wörld!"
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_base.tokenizer.decode(encode_prompt(tiny_base.tokenizer, "Hi")) == expected


def test_the_end_of_turn_comes_from_the_template(tiny_path):
    assert load_base(tiny_path, dtype="float32", chat_template="chatml").end_id == 2
    assert load_base(tiny_path, dtype="float32", chat_template="plain").end_id == 2  # its own eos


def test_a_fingerprint_is_that_of_the_weights(tiny_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.save_pretrained(tmp_path / "same")
    assert fingerprint(tmp_path / "same") == fingerprint(tiny_path)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.neg_()
    model.save_pretrained(tmp_path / "other")
    assert fingerprint(tmp_path / "other") != fingerprint(tiny_path)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bases_load_and_compute_on_the_cpu(tiny_path, quantization):
    plain = load_base(tiny_path, dtype="float32", chat_template="chatml")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml", quantization=quantization)
    assert base.fingerprint == plain.fingerprint
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        difference = (base.model(ids).logits - plain.model(ids).logits).abs().mean() / plain.model(ids).logits.abs().mean()
    assert 0 < difference < 0.3
    assert base.model.lm_head.weight.dtype == torch.float32


def test_nf4_weights_keep_their_bytes_in_eval_mode(tiny_path):
    base = load_base(tiny_path, dtype="float32", chat_template="chatml", quantization="nf4")
    weight = base.model.model.layers[0].mlp.up_proj.weight
    before = weight.data.clone()
    with torch.no_grad():
        base.model.eval()(torch.arange(10, 30)[None])
    assert torch.equal(weight.data, before)


def test_lora_targets_that_match_nothing_are_refused(tiny_base):
    with pytest.raises(InstructLiteError, match="typo_proj is no linear layer.*q_proj"):
        lora_config(Lora(targets=["q_proj", "typo_proj"]), tiny_base.model, "CAUSAL_LM")
    with pytest.raises(InstructLiteError, match="this model has 3 layers"):
        lora_config(Lora(top_layers=4), tiny_base.model, "CAUSAL_LM")
    assert lora_config(Lora(top_layers=2), tiny_base.model, "CAUSAL_LM").layers_to_transform == [1, 2]


def test_a_model_that_is_nowhere_is_one_line(tmp_path):
    with pytest.raises(InstructLiteError, match="no config.json"):
        load_base(tmp_path)
    with pytest.raises(InstructLiteError, match="neither a directory here nor to be had from the Hub") as error:
        base_of("no-such/model-anywhere", BaseOptions())
    assert "\n" not in str(error.value)


def test_processes_that_want_the_embedded_model_at_once_convert_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTLITE_CACHE", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"weights")
    monkeypatch.setattr(base_module, "_GGUF_SHA256", sha256_file(tmp_path / "model.gguf"))
    monkeypatch.setattr(base_module, "require", lambda *names: None)
    written = []

    def write(gguf, cache, target):
        written.append(target)
        time.sleep(0.1)
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"converted")
        (target / "weights.sha256").write_text(sha256_file(target / "model.safetensors"))

    monkeypatch.setattr(base_module, "_write_embedded", write)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(base_module._convert_embedded, [tmp_path / "model.gguf"] * 2))
    assert found == [written[0]] * 2 and len(written) == 1
