"""How answers are drawn: the distribution, its filters, and the memory of a prompt."""

import pytest
import torch
from scipy.stats import chisquare
from test_ppo_trainer import roles

from instructlite.models.sampling import Draw, Sampling, generate, log_probs


def test_draws_follow_the_distribution_and_never_take_what_is_masked():
    probabilities = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.15, 0.04, 0.01, 0.0])
    torch.manual_seed(0)
    scores = Draw()(None, probabilities.log().expand(20_000, -1))
    assert torch.equal(scores.isfinite().sum(1), torch.ones(20_000, dtype=torch.long))
    counts = scores.isfinite().sum(0)
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible].numpy(), (20_000 * probabilities[possible]).numpy()).pvalue > 0.01


def test_rows_are_drawn_apart():
    torch.manual_seed(0)
    tokens = Draw()(None, torch.zeros(64, 260)).argmax(1)
    assert len(tokens.unique()) > 40


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_answers_have_the_log_probability_they_should(temperature, tiny_base):
    """The mean of -log pi over draws is the entropy; a draw from another temperature is off by many standard errors."""
    model, prompt = roles(tiny_base), [1, 70, 80]
    answers = generate(model, [prompt] * 400, "policy", Sampling(max_new_tokens=1, temperature=temperature), stop_ids=[-1], batch_size=400)
    drawn = torch.cat(log_probs(model, ["policy"], [(prompt, answer) for answer in answers], temperature=temperature)[0])
    every = torch.cat(log_probs(model, ["policy"], [(prompt, [token]) for token in range(260)], temperature=temperature)[0])
    entropy, spread = -(every.exp() * every).sum(), (every.exp() * every.square()).sum() - (every.exp() * every).sum().square()
    assert (-drawn.mean() - entropy).abs() < 4 * (spread / len(drawn)).sqrt()


@pytest.mark.parametrize("filtered", [{"top_k": 2}, {"top_p": 1e-6}])
def test_filters_leave_the_likeliest_tokens(filtered, tiny_base):
    model, prompt = roles(tiny_base), [1, 70, 80]
    answers = generate(model, [prompt] * 100, "policy", Sampling(max_new_tokens=1, **filtered), stop_ids=[-1], batch_size=100)
    every = torch.cat(log_probs(model, ["policy"], [(prompt, [token]) for token in range(260)])[0])
    likeliest = every.topk(filtered.get("top_k", 1)).indices.tolist()
    assert {answer[0] for answer in answers} == set(likeliest)


def test_the_head_sees_a_contiguous_state_of_the_prompt(tiny_base):
    """Else each row of a batch is multiplied with a copy of the head of its own."""
    model, seen = roles(tiny_base), []
    head = model.base.model.get_output_embeddings()
    forward = head.forward
    head.forward = lambda states: seen.append(states.is_contiguous()) or forward(states)
    generate(model, [[1, 70, 80], [1, 70]], "policy", Sampling(max_new_tokens=2))
    assert seen and all(seen)


def test_an_answer_with_a_seed_of_its_own_does_not_depend_on_what_else_is_drawn(tiny_base):
    model, prompts = roles(tiny_base), [[1, 70, 80], [1, 70], [1, 90, 91, 92], [1, 70]]
    who, drawn = ["policy", None, "reference", "policy"], {}
    for rows, size in (([0, 1, 2, 3], 4), ([3, 2, 0], 2), ([1], 1)):
        found = generate(
            model, [prompts[i] for i in rows], [who[i] for i in rows], Sampling(max_new_tokens=6), stop_ids=[-1],
            seed=[100 + i for i in rows], batch_size=size,
        )  # fmt: skip
        for i, answer in zip(rows, found, strict=True):
            assert drawn.setdefault(i, answer) == answer
    assert drawn[1] != drawn[3], "another seed and role"
    again = generate(model, [prompts[0]] * 2, "policy", Sampling(max_new_tokens=6), stop_ids=[-1], seed=[100, 7])
    assert again[0] == drawn[0] != again[1]
