"""Rules that a glance at one row can check: the answer repeats the prompt, refuses, breaks off, or carries a template's debris.

They judge the answer that is held up as good; a rejected answer may be as bad as it likes. Only debris is looked for everywhere, since a
reward model would learn it as the mark of one side.
"""

import re
from collections.abc import Callable, Mapping

from ...errors import InstructLiteError
from .steps import Sample, StepCount, excerpt

ACTIONS = ("drop", "count", "off")
# Refusals may be just what is wanted (harmlessness data), and a missing last word is a guess: both are only counted unless asked for.
DEFAULTS = {"template residue": "drop", "answer repeats the prompt": "drop", "refusal": "count", "answer breaks off": "count"}

_RESIDUE = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|begin_of_text|user|assistant|system|end)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|\A\s*<s>|</s>\s*\Z"
    r"|(?m:^\s*###? ?(?:Instruction|Response|Input|Human|Assistant|User):?\s*$)"
    r"|(?m:^\s*### (?:Instruction|Response|Input|Human|Assistant|User):)"
    r"|\n\n(?:Human|Assistant): |\A(?:Human|Assistant): |\{(?:instruction|prompt|input|response|output)\}"
)
_RESIDUE_HINT = re.compile(r"[<\[#{]|Human:|Assistant:")  # three times as fast, and most texts have none
_REFUSAL = re.compile(
    r"\b(?:i(?: am|'m| apologi[sz]e)(?: very| so)?(?: sorry| afraid)?[,.]? ?(?:but )?(?:that )?"
    r"i (?:can ?not|can't|won't|am unable to|am not able to)"
    r"|i(?: can ?not| can't| won't| am unable to|'m unable to| am not able to|'m not able to) "
    r"(?:help|assist|provide|answer|do that|comply|fulfil|give you|tell you|support|engage|discuss|create|generate)"
    r"|i(?:'m| am) (?:sorry|afraid),? (?:but )?(?:that )?(?:i|this|that)(?:'m| am|'s| is)? not (?:able|something|allowed|appropriate)"
    r"|as an ai(?: language)?(?: model| assistant)?,? (?:i|it)\b)",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"(?:[,;(\[{–—]|\b(?:a|an|the|of|and|or|but|to|in|on|at|by|for|with|from|as|is|are|was|were|that|which|because|your|their|its))\Z",
    re.IGNORECASE,
)


def _repeats_prompt(sample: Sample) -> bool:
    """The answer is the last user turn, or begins with all of it as a sentence ("Who is the best driver is debated" does not)."""
    if sample.best is None:
        return False
    question, answer = sample.turns[-1]["content"].casefold().split(), sample.best.casefold().split()
    begins = len(question) >= 4 and answer[: len(question)] == question
    return begins and (len(answer) == len(question) or question[-1][-1] in ".?!:")


def _has_residue(sample: Sample) -> bool:
    texts = [*sample.answers, *(turn["content"] for turn in sample.turns)]
    return any(_RESIDUE_HINT.search(text) and _RESIDUE.search(text) for text in texts)


def refuses(answer: str) -> bool:
    """It opens with words that decline to answer; English only."""
    return bool(_REFUSAL.search(answer.replace("’", "'"), 0, 200))


def _refuses(sample: Sample) -> bool:
    return sample.best is not None and refuses(sample.best)


def _breaks_off(sample: Sample) -> bool:
    """Ends with a comma, an open bracket or a word that wants another, or leaves a code block open."""
    if sample.best is None or len(sample.best.split()) < 5:
        return False
    return bool(_DANGLING.search(sample.best[-12:])) or sample.best.count("```") % 2 == 1


_RULES: dict[str, Callable[[Sample], bool]] = {
    "template residue": _has_residue,
    "answer repeats the prompt": _repeats_prompt,
    "refusal": _refuses,
    "answer breaks off": _breaks_off,
}


def quality(actions: Mapping[str, str], conceal: Callable[[str], str]) -> Callable[[Sample, StepCount], str | None]:
    """actions: for a rule "drop", "count" or "off"; the others have their DEFAULTS. conceal: for what the report shows."""
    for rule, action in actions.items():
        if rule not in _RULES or action not in ACTIONS:
            known = f"rules: {', '.join(_RULES)}; actions: {', '.join(ACTIONS)}"
            raise InstructLiteError(f"quality {rule}={action}: no such rule or action ({known})")
    chosen = {rule: action for rule, action in {**DEFAULTS, **actions}.items() if action != "off"}

    def judge(sample: Sample, count: StepCount) -> str | None:
        broken = [rule for rule in chosen if _RULES[rule](sample)]
        for rule in broken:
            if chosen[rule] == "drop":
                return rule
            count.noticed[rule] += 1
            if len(count.examples.get(rule, ())) < 3:
                count.show(rule, sample, conceal(excerpt(sample)))
        return None

    return judge
