"""Evol-Instruct (Xu et al. 2023, WizardLM): instructions made harder or rarer, round by round; evolutions that failed are eliminated.

An instruction whose evolution failed stays as it was and may evolve otherwise in the next round, as in the paper.
"""

import random
import re

from ...errors import InstructLiteError
from .completer import Answer
from .synthetic import Asking, Generated, fault_of, instruction_of

OPERATIONS = ("deepen", "constrain", "concretise", "breadth")
_LABEL = re.compile(r"^\W*(?:(?:new|rewritten|given|evolved) )?(?:instruction|prompt)\W*:\s*", re.IGNORECASE)
_COPIED = re.compile(r"\b(?:given|rewritten|new|created) (?:prompt|instruction)\b", re.IGNORECASE)
_SORRY = re.compile(r"\b(?:sorry|as an ai)\b", re.IGNORECASE)
_STOP_WORDS = {
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "is", "it", "of", "on", "or", "so", "that", "the", "then",
    "there", "these", "they", "this", "to", "was",
}  # fmt: skip


def evol_instruct(asking: Asking, rows: list[dict], *, rounds: int = 2) -> Generated:
    """Demonstrations of every evolution that did not fail, with its round, operation and the instruction it came from."""
    current = list(dict.fromkeys(filter(None, map(instruction_of, rows))))
    if not current:
        raise InstructLiteError("evol-instruct: no row has a prompt of a single turn")
    result = Generated(asking.method, "demonstrations")
    known = set(current)
    for number in range(rounds):
        chance = random.Random(f"{asking.seed} {number}")
        operations = [chance.choice(OPERATIONS) for _ in current]
        evolved = _evolve(asking, result, current, operations, number, known)
        for i, text in _answered(asking, result, current, operations, number, evolved).items():
            current[i] = text
    result.measured = {"instructions": len(current), "rounds": rounds, "evolved": len(result.rows)}
    return result


def _evolve(asking: Asking, result: Generated, current: list[str], operations: list[str], number: int, known: set[str]) -> dict[int, str]:
    """Index -> the evolved instruction, of those that brought something."""
    requests = [asking.prompts.message(operation, instruction=text) for operation, text in zip(operations, current, strict=True)]
    evolved: dict[int, str] = {}
    for i, answer in enumerate(asking.ask(requests, f"round {number + 1}, evolve", draw=number)):
        text = _LABEL.sub("", answer.text or "").strip().strip('"')
        reason = fault_of(answer) or ("evolution is empty" if not text else None)
        reason = reason or ("evolution speaks of its prompt" if _COPIED.search(text) else None)
        reason = reason or ("evolution is a known instruction" if text in known else None)
        if reason:
            result.reject(reason, instruction=current[i], operation=operations[i], round=number + 1)
        else:
            known.add(text)
            evolved[i] = text
    questions = [asking.prompts.message("gained", instruction=current[i], evolved=text) for i, text in evolved.items()]
    gained: dict[int, str] = {}
    for (i, text), answer in zip(evolved.items(), asking.ask(questions, f"round {number + 1}, compare", temperature=0), strict=True):
        reason = _no_gain(answer)
        if reason:
            result.reject(reason, instruction=current[i], evolved=text, operation=operations[i], round=number + 1)
        else:
            gained[i] = text
    return gained


def _answered(
    asking: Asking, result: Generated, current: list[str], operations: list[str], number: int, evolved: dict[int, str]
) -> dict[int, str]:
    """Writes the rows; returns the evolved instructions without those whose answer shows that they failed."""
    prompts = {i: [{"role": "user", "content": text}] for i, text in evolved.items()}
    kept: dict[int, str] = {}
    for (i, prompt), answer in zip(prompts.items(), asking.ask(list(prompts.values()), f"round {number + 1}, answer"), strict=True):
        said = {"operation": operations[i], "round": number + 1}
        if reason := fault_of(answer) or _useless(answer.text):
            result.reject(reason, instruction=current[i], evolved=evolved[i], **said)
            continue
        kept[i] = evolved[i]
        origin = asking.provenance(answer.created, parent=current[i], **said)
        result.rows.append({"prompt": prompt, "completion": answer.text, "provenance": origin})
    return kept


def _no_gain(answer: Answer) -> str | None:
    verdict = re.match(r"\W*(equal|different)\b", answer.text or "", re.IGNORECASE)
    if verdict is None:
        return "no verdict on what was gained"
    return "evolution gained nothing" if verdict[1].lower() == "equal" else None


def _useless(text: str) -> str | None:
    """The paper's two signs that an instruction has become unanswerable."""
    words = re.findall(r"\w+", text.lower())
    if _SORRY.search(text) and len(words) < 80:
        return "answer is an apology"
    return "answer says nothing" if set(words) <= _STOP_WORDS else None
