"""The layouts of keys that rows come in - our own and those of others - and the way from each to the normal form of its kind.

The normal forms: demonstration {prompt, completion}, comparison {prompt, chosen, rejected}, ranking {prompt, responses, ranks; the
lowest best}, prompt {prompt}, text {text}. A prompt is a list of messages that ends with the user; all else is text. Every other
column of a row (`annotator`, `created`, `category`, ...) comes along as it is.

Three layouts are no row for row: OASST trees give a ranking for each prompt with ranked replies, OASST messages and single scored
answers are put together from rows that follow one another.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .schema import Fault, annotator_of, answer, check_characters, expect, found, messages, nearest, number, printable, prompt_of, text

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
CONTROL_TOKEN = re.compile(r"<\|[\w ]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")


@dataclass(frozen=True)
class Layout:
    """One way to write a kind of record."""

    name: str
    kind: str
    keys: tuple[str, ...]
    """The keys that must be there, and are used up."""
    read: Callable[[Mapping], dict | list[dict]]
    """The fields of the record (or of several: of a tree) from one row that has the keys. With `join`: from the rows of one group."""
    optional: tuple[str, ...] = ()
    """Keys that are used up where they are there."""
    when: Callable[[Mapping], bool] = lambda row: True
    """What else tells it from a layout with the same keys."""
    join: Callable[[Mapping], object] | None = None
    """Rows that follow one another and are alike by this are read together."""

    def __str__(self) -> str:
        return f"{self.kind} ({', '.join(self.keys)})"

    def fit(self, row: Mapping) -> tuple[int, int]:
        """Larger fits better: a key counts 2, a misspelt one 1; then fewer missing keys win."""
        seen = [2 if key in row else 1 if nearest(key, row) else 0 for key in self.keys]
        return sum(seen), -seen.count(0)


def best_layout(row: Mapping, kind: str | None = None) -> Layout | None:
    """The layout (of `kind`, if given) that the row's keys fit best. None: they fit none at all."""
    fits = {layout: layout.fit(row) for layout in LAYOUTS if kind in (None, layout.kind) and layout.when(row)}
    layout = max(fits, key=fits.__getitem__, default=None)
    return layout if layout and fits[layout][0] else None


def normalise(row: Mapping, layout: Layout) -> list[dict]:
    """The records of one row that `check` has passed, in the normal form of their kind, its other columns kept.

    Raises Fault.
    """
    read = layout.read(row)
    records = read if isinstance(read, list) else [read]
    return [{**fields, **others(row, layout, fields)} for fields in records]


def join(rows: list[Mapping], layout: Layout) -> list[dict]:
    """The records of rows that belong together. Their other columns: the value where all have the same, else the list of values."""
    return [
        {**fields, **{key: value for key, value in _merged(members).items() if key not in (*layout.keys, *fields)}}
        for fields, members in layout.read(rows)
    ]


def check(row: Mapping, layout: Layout) -> bool:
    """True if there may be control characters in the row. Raises Fault if a key of the layout is missing or a text is broken."""
    _check_keys(row, layout)
    return check_characters(row)


def others(row: Mapping, layout: Layout, fields: Mapping) -> dict:
    used = {*layout.keys, *layout.optional, *fields}
    return {key: value for key, value in row.items() if key not in used}


def same_text(first: str, second: str) -> bool:
    """White space and control tokens aside."""
    if not any(mark in text for mark in "<[" for text in (first, second)) and first.lstrip()[:1] != second.lstrip()[:1]:
        return False
    return CONTROL_TOKEN.sub(" ", first).split() == CONTROL_TOKEN.sub(" ", second).split()


def _check_keys(row: Mapping, layout: Layout) -> None:
    missing = next((key for key in layout.keys if key not in row), None)
    if missing is None:
        return
    own = best_layout(row)
    # Only a row that is complete in another way is of another kind; any other row lacks a key.
    if own and not set(own.keys) <= set(layout.keys) and set(own.keys) <= set(row):
        raise Fault(f"has the keys of {own}, expected {layout} (keep each kind in its own file){_further_fault(row, own)}")
    spelt = nearest(missing, (key for key in row if key not in layout.keys))
    hint = f"rename '{printable(spelt)}'" if spelt else found(row)
    raise Fault(f"key '{missing}' is missing ({hint})")


def _further_fault(row: Mapping, layout: Layout) -> str:
    try:
        check(row, layout)
        if not layout.join:
            normalise(row, layout)
    except Fault as fault:
        return f"; and {fault}"
    return ""


def _merged(rows: list[Mapping]) -> dict:
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [row.get(key) for row in rows] for key in keys}
    return {key: column[0] if all(value == column[0] for value in column) else column for key, column in values.items()}


def _demonstration(row: Mapping) -> dict:
    return {"prompt": prompt_of(row), "completion": answer(row["completion"], "'completion'")}


def _from_messages(row: Mapping) -> dict:
    turns = messages(row["messages"], "'messages'", last="assistant")
    return {"prompt": turns[:-1], "completion": turns[-1]["content"]}


def _compared(prompt: list[dict], chosen: str, rejected: str) -> dict:
    if same_text(chosen, rejected):
        raise Fault("'chosen' and 'rejected' are the same text (remove the row)")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _comparison(row: Mapping) -> dict:
    sides = row["chosen"], row["rejected"]
    if all(isinstance(side, list) and len(side) > 1 for side in sides):  # UltraFeedback: the prompt is told again in both
        fields, asked = _from_conversations(row), row["prompt"]
        if asked not in (fields["prompt"], fields["prompt"][-1]["content"]):
            raise Fault("'chosen' is a conversation of its own, and its prompt is not 'prompt' (leave one of them out)")
        return fields
    return _compared(prompt_of(row), answer(row["chosen"], "'chosen'"), answer(row["rejected"], "'rejected'"))


def _from_conversations(row: Mapping) -> dict:
    """TRL's implicit prompt: two conversations that part at the last turn."""
    for name in ("chosen", "rejected"):
        expect(row[name], list, f"'{name}' without a 'prompt'", "a list of messages")
    return _parted(*(messages(row[name], f"'{name}'", last="assistant") for name in ("chosen", "rejected")))


def _from_transcripts(row: Mapping) -> dict:
    """hh-rlhf: two transcripts that part at the last turn."""
    return _parted(*(_transcript(row[name], f"'{name}'") for name in ("chosen", "rejected")))


def _parted(chosen: list[dict], rejected: list[dict]) -> dict:
    if chosen[:-1] != rejected[:-1]:
        raise Fault("'chosen' and 'rejected' differ before their last turn, so that they have no prompt in common (add 'prompt')")
    return _compared(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _transcript(value: object, where: str) -> list[dict]:
    expect(value, str, where, "a transcript ('\\n\\nHuman: … \\n\\nAssistant: …')")
    before, *parts = _TURN.split(value if value.startswith("\n\n") else "\n\n" + value.lstrip())
    if before.strip() or not parts:
        raise Fault(f"{where} is no transcript: it does not begin with 'Human:'")
    turns = [
        {"role": {"Human": "user"}.get(who, "assistant"), "content": said.strip()} for who, said in zip(*[iter(parts)] * 2, strict=True)
    ]
    return messages(turns, where, last="assistant")


def _from_alpaca(row: Mapping) -> dict:
    return {"prompt": _instruction(row, "input"), "completion": text(row["output"], "'output'")}


def _from_alpaca_pair(row: Mapping) -> dict:
    return _compared(_instruction(row, "input"), text(row["chosen"], "'chosen'"), text(row["rejected"], "'rejected'"))


def _from_dolly(row: Mapping) -> dict:
    return {"prompt": _instruction(row, "context"), "completion": text(row["response"], "'response'")}


def _instruction(row: Mapping, passage: str) -> list[dict]:
    """The instruction, and after a blank line the passage it is about, if there is one; before them system text and history."""
    turns = []
    if row.get("system"):
        turns.append({"role": "system", "content": row["system"]})
    history = row.get("history") or []
    expect(history, list, "'history'", "a list of pairs")
    for number_, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f"'history' {number_} is no pair of instruction and answer")
        turns += [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    asked = text(row["instruction"], "'instruction'")
    about = row.get(passage)
    if about is not None:
        expect(about, str, f"'{passage}'", "a text")
        asked += "\n\n" + text(about, f"'{passage}'") if about.strip() else ""
    return messages([*turns, {"role": "user", "content": asked}], "'history'", last="user")


def _from_sharegpt(row: Mapping) -> dict:
    turns = _sharegpt(row, last="assistant")
    return {"prompt": turns[:-1], "completion": turns[-1]["content"]}


def _from_sharegpt_pair(row: Mapping) -> dict:
    sides = (_sharegpt({"conversations": [row[name]]}, "assistant", f"'{name}'", alone=True) for name in ("chosen", "rejected"))
    return _compared(_sharegpt(row, last="user"), *(side[-1]["content"] for side in sides))


def _sharegpt(row: Mapping, last: str, where: str = "'conversations'", alone: bool = False) -> list[dict]:
    turns = row["conversations"]
    expect(turns, list, where, "a list of messages")
    if alone:  # an answer: what comes before it stands elsewhere
        turns = [{"from": "human", "value": "?"}, *turns]
    elif row.get("system"):
        turns = [{"from": "system", "value": row["system"]}, *turns]
    return messages(turns, where, last, keys=("from", "value"), roles=_SHAREGPT_ROLES)


def _ranking(row: Mapping) -> dict:
    expect(row["ranks"], list, "'ranks'", "a list of numbers, the lowest the best")
    return _ranked(prompt_of(row), row["responses"], row["ranks"], "ranks")


def _from_order(row: Mapping) -> dict:
    """`ranking`: the numbers of the responses from the best to the worst, counted from 0."""
    responses, order = row["responses"], row["ranking"]
    expect(responses, list, "'responses'", "a list of texts")
    expect(order, list, "'ranking'", "the numbers of the responses, the best first, counted from 0")
    for place, index in enumerate(order, 1):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(responses):
            raise Fault(f"'ranking' has {printable(index)} in place {place}, expected a number from 0 to {len(responses) - 1}")
    if len(set(order)) < len(order) or len(order) != len(responses):
        raise Fault(f"'ranking' {order} does not name each of the {len(responses)} responses once")
    return _ranked(prompt_of(row), responses, [order.index(index) for index in range(len(responses))], "ranking")


def _from_scores(row: Mapping) -> dict:
    """Likert: a score for each response, the highest the best; equal scores are ties."""
    expect(row["scores"], list, "'scores'", "a list of numbers, the highest the best")
    return _ranked(prompt_of(row), row["responses"], row["scores"], "scores") | {"scores": row["scores"]}


def _ranked(prompt: list[dict], responses: object, values: list, name: str) -> dict:
    expect(responses, list, "'responses'", "a list of texts")
    if len(responses) < 2:
        raise Fault(f"a ranking needs at least 2 responses, this one has {len(responses)} (remove the row)")
    if len(values) != len(responses):
        raise Fault(f"{len(responses)} 'responses' but {len(values)} '{name}' (one {name.removesuffix('s')} for each response)")
    for place, value in enumerate(values, 1):
        number(value, f"{name.removesuffix('s')} {place}")
    if len(set(values)) == 1:
        raise Fault("all responses are tied: nothing can be learned from this ranking (remove the row)")
    answers = [answer(response, f"response {place}") for place, response in enumerate(responses, 1)]
    known: dict[tuple[str, ...], int] = {}
    for place, (said, value) in enumerate(zip(answers, values, strict=True), 1):
        first = known.setdefault(tuple(said.split()), place)
        if values[first - 1] != value:
            raise Fault(f"responses {first} and {place} are the same text with different {name} (remove one)")
    best_first = sorted(set(values), reverse=True)
    return {
        "prompt": prompt,
        "responses": answers,
        "ranks": [best_first.index(value) for value in values] if name == "scores" else list(values),
    }


def _from_scored_answers(rows: list[Mapping]) -> list[tuple[dict, list[Mapping]]]:
    """Likert, an answer a row: those of one prompt and annotator are one ranking."""
    by_annotator: dict[str | None, list[Mapping]] = {}
    for row in rows:
        by_annotator.setdefault(annotator_of(row), []).append(row)
    joined = []
    for members in by_annotator.values():
        if len(members) < 2:
            raise Fault("is the only scored answer to its prompt here, and a ranking needs 2 (sort the file, so that they stand together)")
        responses, scores = ([row[key] for row in members] for key in ("response", "score"))
        joined.append((_ranked(prompt_of(members[0]), responses, scores, "scores") | {"scores": scores}, members))
    return joined


def _from_tree(row: Mapping) -> list[dict]:
    """OASST: a ranking for each prompt with at least two ranked replies."""
    rankings = [fields | _tree_name(row) for fields in _walk(row["prompt"]) if "responses" in fields]
    if not rankings:
        raise Fault("the tree has no prompt with two ranked replies (nothing to compare: remove the row)")
    return rankings


def _demonstrations_from_tree(row: Mapping) -> list[dict]:
    """OASST: the reply that was ranked first, or the only one, of each prompt."""
    best = [fields | _tree_name(row) for fields in _walk(row["prompt"]) if "completion" in fields]
    if not best:
        raise Fault("the tree has no reply (remove the row)")
    return best


def _tree_name(row: Mapping) -> dict:
    return {"message_tree_id": row["message_tree_id"]} if "message_tree_id" in row else {}


def _walk(root: object) -> list[dict]:
    """For each prompt of the tree its ranking (if two replies are ranked) and its best reply (if that is known)."""
    fields: list[dict] = []
    stack: list[tuple[object, list[dict], str]] = [(root, [], "'prompt'")]
    while stack:
        node, before, where = stack.pop()
        expect(node, Mapping, where, "an object with 'text', 'role' and 'replies'")
        turn = {"role": node.get("role"), "content": node.get("text")}
        last = "user" if turn["role"] in ("prompter", "user") else "assistant"
        path = messages([*before, {**turn, "role": last if turn["role"] == "prompter" else turn["role"]}], where, last=last)
        replies = node.get("replies") or []
        expect(replies, list, f"{where}: 'replies'", "a list")
        kept = [reply for reply in replies if not (isinstance(reply, Mapping) and _was_removed(reply))]
        stack += [(reply, path, f"{where}, reply {place}") for place, reply in reversed(list(enumerate(kept, 1)))]
        if last == "user":
            fields += _replies(kept, path, node)
    return fields


def _was_removed(reply: Mapping) -> bool:
    return bool(reply.get("deleted")) or reply.get("review_result") is False


def _replies(replies: list, prompt: list[dict], node: Mapping) -> list[dict]:
    about = {key: node[key] for key in ("message_id", "lang") if key in node}
    ranked = [reply for reply in replies if isinstance(reply, Mapping) and reply.get("rank") is not None]
    fields: list[dict] = []
    if len(ranked) > 1:
        fields.append(_ranked(prompt, [reply.get("text") for reply in ranked], [reply["rank"] for reply in ranked], "ranks") | about)
    best = min(ranked, key=lambda reply: reply["rank"]) if ranked else replies[0] if len(replies) == 1 else None
    if isinstance(best, Mapping):
        fields.append({"prompt": prompt, "completion": text(best.get("text"), "'text'")} | about)
    return fields


def _tree_of(rows: list[Mapping]) -> Mapping:
    for row in rows:
        expect(row["message_id"], str, "'message_id'", "a text")
        expect(row["parent_id"] or "", str, "'parent_id'", "a text or null")
    nodes = {row["message_id"]: {**row, "replies": []} for row in rows}
    roots = []
    for node in nodes.values():
        parent = node["parent_id"]
        if parent is not None and parent not in nodes:
            raise Fault(f"message {printable(node['message_id'])} answers {printable(parent)}, which is not beside it (sort by tree)")
        (nodes[parent]["replies"] if parent is not None else roots).append(node)
    if len(roots) != 1:
        raise Fault(f"the messages of one tree have {len(roots)} roots ('parent_id' null), expected 1")
    return {"prompt": roots[0]}


def _from_tree_messages(rows: list[Mapping]) -> list[tuple[dict, list[Mapping]]]:
    about = [{key: row[key] for key in ("message_tree_id", "tree_state") if key in row} for row in rows]
    return [(fields, about) for fields in _from_tree(_tree_of(rows))]


def _same_prompt(row: Mapping) -> object:
    return row["prompt"]


def _same_tree(row: Mapping) -> object:
    return row.get("message_tree_id")


def _holds(*keys: str) -> Callable[[Mapping], bool]:
    """For layouts whose keys other rows may have by chance, or nearly: a prompt with a `score` is no scored answer."""
    return lambda row: all(key in row for key in keys)


def _is_transcript(row: Mapping) -> bool:
    return isinstance(row.get("chosen"), str) and "prompt" not in row


LAYOUTS = (
    Layout("messages", "demonstrations", ("messages",), _from_messages),
    Layout("prompt-completion", "demonstrations", ("prompt", "completion"), _demonstration),
    Layout("comparisons", "comparisons", ("prompt", "chosen", "rejected"), _comparison),
    Layout("conversations", "comparisons", ("chosen", "rejected"), _from_conversations, when=lambda row: not _is_transcript(row)),
    Layout("hh-rlhf", "comparisons", ("chosen", "rejected"), _from_transcripts, when=_is_transcript),
    Layout("rankings", "rankings", ("prompt", "responses", "ranks"), _ranking),
    Layout("order", "rankings", ("prompt", "responses", "ranking"), _from_order, when=_holds("ranking")),
    Layout("likert", "rankings", ("prompt", "responses", "scores"), _from_scores, when=_holds("scores")),
    Layout("prompts", "prompts", ("prompt",), lambda row: {"prompt": prompt_of(row)}),
    Layout("texts", "texts", ("text",), lambda row: {"text": text(row["text"], "'text'")}),
    Layout("alpaca", "demonstrations", ("instruction", "output"), _from_alpaca, ("input", "system", "history")),
    Layout("alpaca-pairs", "comparisons", ("instruction", "chosen", "rejected"), _from_alpaca_pair, ("input", "system", "history")),
    Layout("dolly", "demonstrations", ("instruction", "response"), _from_dolly, ("context", "system", "history")),
    Layout("sharegpt", "demonstrations", ("conversations",), _from_sharegpt, ("system",)),
    Layout("sharegpt-pairs", "comparisons", ("conversations", "chosen", "rejected"), _from_sharegpt_pair, ("system",)),
    Layout("oasst-trees", "rankings", ("message_tree_id", "prompt"), _from_tree, when=lambda row: isinstance(row.get("prompt"), Mapping)),
    Layout("oasst-trees", "demonstrations", ("message_tree_id", "prompt"), _demonstrations_from_tree,
           when=lambda row: isinstance(row.get("prompt"), Mapping)),
    Layout("oasst-messages", "rankings", ("message_id", "parent_id", "text", "role"), _from_tree_messages,
           when=_holds("message_id", "parent_id"), join=_same_tree),
    Layout("scored-answers", "rankings", ("prompt", "response", "score"), _from_scored_answers,
           when=_holds("response", "score"), join=_same_prompt),
)  # fmt: skip
FORMATS = tuple(dict.fromkeys(layout.name for layout in LAYOUTS))
