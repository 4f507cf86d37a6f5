"""Constitutional critique and revision (Bai et al. 2022): the model criticises its own answer by a principle and revises it.

The revised answer is chosen, the first one rejected. Principles and prompts stand in prompts/constitutional.yaml.
"""

import random
import re

from ...errors import InstructLiteError
from .completer import Answer, Messages
from .synthetic import Asking, Generated, different_prompts, fault_of
from .templates import transcript

_NONE = re.compile(r"\W*none\W*", re.IGNORECASE)


def constitutional(asking: Asking, rows: list[dict], *, revisions: int = 1) -> Generated:
    """Comparisons: the answer after `revisions` rounds, each by a principle drawn anew, against the first one."""
    principles = _principles(asking)
    result = Generated(asking.method, "comparisons")
    prompts = different_prompts(rows)
    first: dict[int, Answer] = {}
    for i, answer in enumerate(asking.ask(prompts, "first answers")):
        if reason := fault_of(answer):
            result.reject(reason, prompt=prompts[i])
        else:
            first[i] = answer
    last, history = dict(first), {i: [] for i in first}
    for number in range(revisions):
        drawn = {i: random.Random(f"{asking.seed} {number} {i}").choice(principles) for i in last}
        _revise(asking, result, prompts, last, drawn, history, number)
    for i in first:
        _add(asking, result, prompts[i], first[i], last.get(i), history[i])
    result.measured = {"prompts": len(prompts), "principles": len(principles), "revisions": revisions}
    return result


def _add(asking: Asking, result: Generated, prompt: Messages, first: Answer, last: Answer | None, history: list[dict]) -> None:
    if last is None:
        return  # rejected on the way, with the reason
    if last is first:
        return result.reject("nothing to criticise", prompt=prompt, answer=first.text)
    if last.text.split() == first.text.split():
        return result.reject("revision changed nothing", prompt=prompt, answer=first.text)
    row = {"prompt": prompt, "chosen": last.text, "rejected": first.text}
    result.rows.append({**row, "provenance": asking.provenance(last.created, revisions=history)})


def _revise(
    asking: Asking,
    result: Generated,
    prompts: list[Messages],
    last: dict[int, Answer],
    drawn: dict[int, dict],
    history: dict[int, list[dict]],
    number: int,
) -> None:
    """One round: `last` holds the answers before and after it; those whose critique or revision is missing leave it."""
    said = {i: {"conversation": transcript(prompts[i]), "answer": last[i].text} for i in last}
    requests = [asking.prompts.message("critique", request=drawn[i]["critique"], **said[i]) for i in last]
    critiques = dict(zip(list(last), asking.ask(requests, f"critiques {number + 1}", draw=number), strict=True))
    found: dict[int, str] = {}
    for i, critique in critiques.items():
        if reason := fault_of(critique):
            result.reject(f"critique: {reason}", prompt=prompts[i], answer=last.pop(i).text)
        elif not _NONE.fullmatch(critique.text):
            found[i] = critique.text
    requests = [asking.prompts.message("revision", request=drawn[i]["revision"], critique=text, **said[i]) for i, text in found.items()]
    for i, revision in zip(found, asking.ask(requests, f"revisions {number + 1}", draw=number), strict=True):
        if reason := fault_of(revision):
            result.reject(f"revision: {reason}", prompt=prompts[i], answer=last.pop(i).text)
        else:
            last[i] = revision
            history[i].append({"principle": drawn[i]["name"], "critique": found[i]})


def _principles(asking: Asking) -> list[dict]:
    principles = asking.prompts.others.get("principles")
    if not isinstance(principles, list) or not principles:
        raise InstructLiteError(f"{asking.prompts.path}: 'principles' is missing: a list, each with name, critique and revision")
    for number, principle in enumerate(principles, 1):
        if not isinstance(principle, dict) or not all(isinstance(principle.get(key), str) for key in ("name", "critique", "revision")):
            raise InstructLiteError(f"{asking.prompts.path}: principle {number} lacks a text for name, critique or revision")
    return principles
