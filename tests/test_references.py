"""Exact match, BLEU, ROUGE-L, self-BLEU and the hallucination proxy on texts whose values can be worked out by hand, or by sacrebleu."""

import math
import sys

import numpy as np
import pytest
import sacrebleu

from instructlite.errors import InstructLiteError
from instructlite.evaluation import references
from instructlite.evaluation.references import bleu, exact_match, rouge_l, self_bleu, unsupported

PASSAGE = "The Golden Gate Bridge opened in 1937. It links San Francisco to Marin County, and is 1,280 metres long."


def test_exact_match_looks_past_case_punctuation_and_articles():
    assert exact_match("The Paris!", "paris") == 1
    assert exact_match("Paris, France", "paris") == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # police killed the gunman / police kill the gunman: stems are alike; "the gunman kill police" shares "the gunman" or "kill": 2 of 4
    assert rouge_l(["police kill the gunman", "the gunman kill police"], ["police killed the gunman"] * 2).tolist() == pytest.approx(
        [1, 0.5]
    )


def test_bleu_is_sacrebleus_corpus_score_and_its_interval_holds_it():
    said = ["the cat is on the mat", "there is a big dog here", "hello big world of ours", "a tree stood in front of the house"]
    people = ["the cat sat on the mat", "there is a big dog", "hello world of ours", "a tree is in front of the house"]
    found = bleu([[text] for text in said], people)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(said, [people]).score)
    assert found.low < found.value < found.high
    assert bleu([[text] for text in people], people).value == pytest.approx(100)


def test_bleu_of_several_answers_to_a_prompt_is_that_of_all_of_them():
    said = [["the cat is on the mat", "a cat sat on the mat"], ["big dog", "there is a big dog"]]
    people = ["the cat sat on the mat", "there is a big dog"]
    flat = sacrebleu.corpus_bleu([text for own in said for text in own], [[text for text in people for _ in range(2)]])
    assert bleu(said, people).value == pytest.approx(flat.score)


def test_self_bleu_is_100_for_copies_and_low_for_texts_with_nothing_in_common():
    assert self_bleu(["one two three four five"] * 3).tolist() == pytest.approx([100] * 3)
    assert self_bleu(["one two three four five", "six seven eight nine ten"]).max() < 10
    assert np.isnan(self_bleu(["", "a b c d"])[0]) and np.isnan(self_bleu(["alone"])[0])


def test_self_bleu_takes_equally_many_texts_of_everybody():
    found = self_bleu(["one two three four five"] * (references.SELF_BLEU_TEXTS + 5))
    assert np.isnan(found).sum() == 5


def test_what_the_passage_says_in_its_own_words_is_supported():
    assert unsupported("It opened in 1937 and is 1280 metres long.", [PASSAGE]) == 0
    assert unsupported("The bridge links them.", [PASSAGE]) == 0


def test_names_and_numbers_that_the_passage_has_not_are_unsupported():
    # content words: opened, 1933, Oakland; the passage has the first
    assert unsupported("It opened in 1933 in Oakland.", [PASSAGE]) == pytest.approx(2 / 3)
    assert unsupported("Penguins!", [PASSAGE]) == 1


def test_an_answer_without_content_says_nothing_that_could_be_made_up():
    assert math.isnan(unsupported("It is so.", [PASSAGE])) and math.isnan(unsupported("", [PASSAGE]))


@pytest.mark.parametrize("module, options", [("sacrebleu", {}), ("bert_score", {"encoder": "some/encoder"}), ("mauve", {"mauve": True})])
def test_a_missing_package_is_one_line_with_the_command(module, options, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InstructLiteError, match=rf"^{module} is not installed: pip install 'instructlite\[(eval|references)\]'$"):
        references.require_all(**options)


def test_an_encoder_that_cannot_be_had_is_said_before_anything_is_computed(tmp_path):
    pytest.importorskip("bert_score", reason="pip install 'instructlite[references]'")
    with pytest.raises(InstructLiteError, match="no such encoder"):
        references.require_all(encoder=str(tmp_path / "none"))


def test_bert_score_prefers_the_same_words(tmp_path):
    pytest.importorskip("bert_score", reason="pip install 'instructlite[references]'")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "dog", "on", "mat"]))
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=11, **sizes)).save_pretrained(tmp_path)
    same, other = references.bert_score(["the cat sat", "the dog"], ["the cat sat", "on mat"], str(tmp_path))
    assert same == pytest.approx(1, abs=1e-5) and other < 0.95


def test_mauve_is_1_for_the_same_features_and_near_0_for_features_apart():
    pytest.importorskip("mauve", reason="pip install 'instructlite[references]'")
    features = np.random.default_rng(0).normal(size=(40, 8)).astype("float32")
    assert references.mauve(features, features) == pytest.approx(1)
    assert references.mauve(features, features + 9) < 0.05
