"""Answers of the policy itself among those that are compared: what PPO will ask a reward model about, and what it else has never seen.

Stiennon (2020) and InstructGPT had people compare the policy's own samples. Where nobody did, this takes for granted that a sample of a
small SFT policy is no better than the worst of a prompt's answers, as SPIN (Chen 2024, arXiv:2401.01335) does of people's answers. Of
several samples the longest that ends is taken: else it would be told by its length alone, and so would all other answers afterwards.
"""

from __future__ import annotations

import random

from ..config import BaseOptions
from ..models.base import base_of
from ..models.manifest import Adapter
from ..models.roles import RoleModel
from ..models.sampling import Sampling, generate
from ..progress import progress

DRAWS = 2
BATCH_SIZE = 96
LONGEST = 64  # tokens of a sample
SHORTEST = 4


def add_policy_samples(
    groups: list[dict], policy: Adapter, share: float, *, options: BaseOptions, seed: int, max_length: int | None
) -> list[dict]:
    """The groups (see `as_groups`), such a share of them with one answer more that ties with the worst.

    Drawn at temperature 1. Prompts that leave no room below `max_length` tokens are passed over; None: no limit.
    """
    base = base_of(policy, options)
    model = RoleModel.load(base, {"policy": policy})
    encoded = [base.encode_prompt(group["prompt"]) for group in groups]
    fitting = [i for i, ids in enumerate(encoded) if max_length is None or len(ids) + LONGEST <= max_length]
    chosen = sorted(random.Random(seed).sample(fitting, min(round(share * len(groups)), len(fitting))))
    asked = [i for i in chosen for _ in range(DRAWS)]
    with progress("reward: answers of the policy", len(asked)) as advance:
        answers = generate(
            model, [encoded[i] for i in asked], "policy", Sampling(LONGEST, 1.0), seed=seed, batch_size=BATCH_SIZE, progress=advance
        )
    longest: dict[int, list[int]] = {}
    for i, answer in zip(asked, answers, strict=True):
        if answer[-1] in base.stop_ids and len(answer) >= max(SHORTEST, len(longest.get(i, [])) + 1):
            longest[i] = answer
    return [
        {**group, "responses": [*group["responses"], base.decode(longest[i])], "ranks": [*group["ranks"], max(group["ranks"])]}
        if i in longest
        else group
        for i, group in enumerate(groups)
    ]
