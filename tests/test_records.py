"""Every fault that a data file shows by itself is named with file and line, and good rows come out in one normal form."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import tracemalloc

import datasets
import pytest

from instructlite.data import containers
from instructlite.data.check import check_file
from instructlite.data.records import as_groups, data_hash, read_records, split_by_prompt, write_records
from instructlite.data.schema import KINDS
from instructlite.errors import BadRecords, InstructLiteError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


GOOD = {
    "demonstrations": {"prompt": "Hi", "completion": "Hello."},
    "comparisons": {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."},
    "rankings": {"prompt": "Hi", "responses": ["Hello.", "Go.", "Yes?"], "ranks": [0, 2, 1]},
    "prompts": {"prompt": "Hi"},
    "texts": {"text": "It was a dark night."},
}


def line(row):
    return row if isinstance(row, bytes) else json.dumps(row).encode()


@pytest.fixture
def jsonl(tmp_path):
    """Write rows (objects, or bytes as they are) into a file, one a line."""

    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"".join(line(row) + b"\n" for row in rows))
        return path

    return write


def demonstration(**changes):
    return {key: value for key, value in (GOOD["demonstrations"] | changes).items() if value is not ...}


def comparison(**changes):
    return {key: value for key, value in (GOOD["comparisons"] | changes).items() if value is not ...}


def ranking(**changes):
    return {key: value for key, value in (GOOD["rankings"] | changes).items() if value is not ...}


DEEP = b'{"prompt": "a", "completion": "b", "z": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# The first row of the file is good and tells the kind; the bad one is line 2.
FAULTS = {
    "cut line": (
        "demonstrations",
        b'{"prompt": "Hi", "completion": "Hel',
        "broken JSON at column 32: Unterminated string starting at (is the line cut?)",
    ),
    "trailing comma": ("demonstrations", b'{"prompt": "Hi", "completion": "Hello.",}', "broken JSON at column"),
    "excerpt of the line": ("demonstrations", b'{"prompt": "Hi" "completion": "Hello."}', '"completion": "Hello."'),
    "no JSON": ("demonstrations", b"prompt,completion", "broken JSON at column 1"),
    "latin-1": ("demonstrations", b'{"prompt": "caf\xe9", "completion": "b"}', "byte 16 (0xe9) is not UTF-8"),
    "key twice": ("demonstrations", b'{"prompt": "a", "prompt": "b", "completion": "c"}', "key 'prompt' is given twice"),
    "key twice inside": ("demonstrations", b'{"prompt": "a", "completion": "c", "z": {"k": 1, "k": 2}}', "key 'k' is given twice"),
    "NaN": ("demonstrations", b'{"prompt": "a", "completion": "c", "score": NaN}', "holds NaN"),
    "infinity": ("demonstrations", b'{"prompt": "a", "completion": "c", "score": -Infinity}', "holds -Infinity"),
    "infinite exponent": ("demonstrations", b'{"prompt": "a", "completion": "c", "score": 1e999}', "holds 1e999"),
    "endless integer": ("demonstrations", b'{"prompt": "a", "completion": "c", "n": ' + b"9" * 5000 + b"}", "cannot be read"),
    "nested without end": ("demonstrations", DEEP, "nested too deep"),
    "nested too deep": ("demonstrations", demonstration(z=json.loads("[" * 60 + "]" * 60)), "nested more than 50 levels"),
    "not an object": ("demonstrations", ["Hi", "Hello."], "is not an object"),
    "lone surrogate": ("demonstrations", b'{"prompt": "a", "completion": "\\ud800"}', "'completion' holds half of a character"),
    "surrogate in another column": ("demonstrations", b'{"prompt": "a", "completion": "b", "z": ["\\udc00"]}', "'z' holds half"),
    "misspelt key": ("demonstrations", {"promt": "Hi", "completion": "Hello."}, "key 'prompt' is missing (rename 'promt')"),
    "key in capitals": ("comparisons", comparison(chosen=..., CHOSEN="x"), "key 'chosen' is missing (rename 'CHOSEN')"),
    "missing key": ("demonstrations", {"prompt": "Hi", "answer": "x"}, "key 'completion' is missing (found: prompt, answer)"),
    "half of another kind": ("demonstrations", {"prompt": "Hi", "chosen": "x"}, "key 'completion' is missing (found: prompt, chosen)"),
    "no key at all": ("demonstrations", {}, "key 'prompt' is missing (found: no keys)"),
    "another kind": (
        "demonstrations",
        GOOD["comparisons"],
        "has the keys of comparisons (prompt, chosen, rejected), expected demonstrations",
    ),
    "another layout": ("demonstrations", {"messages": [user("a"), assistant("b")]}, "has the keys of demonstrations (messages), expected"),
    "another kind, bad too": ("demonstrations", ranking(responses=["x"], ranks=[0]), "; and a ranking needs at least 2 responses"),
    "null": ("demonstrations", demonstration(completion=None), "'completion' is null, expected a text"),
    "number": ("demonstrations", demonstration(completion=4), "'completion' is a number, expected a text"),
    "bool": ("demonstrations", demonstration(completion=True), "'completion' is true or false, expected a text"),
    "object": ("demonstrations", demonstration(completion={"text": "x"}), "'completion' is an object, expected a text"),
    "prompt is a number": ("prompts", {"prompt": 4.5}, "'prompt' is a number, expected a text or a list of messages"),
    "text is a list": ("texts", {"text": ["x"]}, "'text' is a list, expected a text"),
    "empty completion": ("demonstrations", demonstration(completion=""), "'completion' is empty"),
    "blank prompt": ("demonstrations", demonstration(prompt=" \n\u2003"), "'prompt' is empty"),
    "only control characters": ("demonstrations", demonstration(completion="\x00\x1b"), "'completion' is empty"),
    "empty chosen": ("comparisons", comparison(chosen="  "), "'chosen' is empty"),
    "empty turn": ("demonstrations", demonstration(prompt=[user("a"), assistant(""), user("b")]), "'prompt', turn 2: 'content' is empty"),
    "no messages": ("demonstrations", demonstration(prompt=[]), "'prompt' has no messages"),
    "message is a text": ("demonstrations", demonstration(prompt=["Hi"]), "'prompt', turn 1 is a text, expected an object"),
    "message without role": (
        "demonstrations",
        demonstration(prompt=[{"from": "human", "value": "a"}]),
        "turn 1: key 'role' is missing (found: from",
    ),
    "message without content": (
        "demonstrations",
        demonstration(prompt=[{"role": "user"}]),
        "turn 1: key 'content' is missing (found: role)",
    ),
    "content in parts": (
        "demonstrations",
        demonstration(prompt=[user([{"type": "text"}])]),
        "turn 1: 'content' is a list, expected a text",
    ),
    "unknown role": (
        "demonstrations",
        demonstration(prompt=[{"role": "tool", "content": "x"}]),
        "turn 1: unknown role 'tool' (known: system",
    ),
    "foreign role": (
        "demonstrations",
        demonstration(prompt=[{"role": "human", "content": "x"}]),
        "unknown role 'human' (did you mean 'user'?)",
    ),
    "misspelt role": ("demonstrations", demonstration(prompt=[{"role": "asistant", "content": "x"}]), "(did you mean 'assistant'?)"),
    "role is a list": ("demonstrations", demonstration(prompt=[{"role": ["user"], "content": "x"}]), "unknown role"),
    "assistant first": (
        "demonstrations",
        demonstration(prompt=[assistant("a"), user("b")]),
        "turn 1: assistant comes first, expected user",
    ),
    "user twice": ("demonstrations", demonstration(prompt=[user("a"), user("b")]), "turn 2: user follows user, expected assistant"),
    "system later": ("demonstrations", demonstration(prompt=[user("a"), assistant("b"), system("c"), user("d")]), "turn 3: system follows"),
    "only system": ("demonstrations", demonstration(prompt=[system("a")]), "'prompt' ends with turn 1 of the system"),
    "prompt ends with assistant": (
        "prompts",
        {"prompt": [user("a"), assistant("b")]},
        "ends with turn 2 of the assistant, expected one of the user",
    ),
    "two answers": ("comparisons", comparison(chosen=[assistant("a"), user("b")]), "'chosen' has 2 messages, expected one"),
    "answer by the user": ("comparisons", comparison(chosen=[user("a")]), "'chosen', turn 1: expected the role 'assistant'"),
    "same answers": ("comparisons", comparison(rejected=" Hello. \n"), "'chosen' and 'rejected' are the same text"),
    "one response": ("rankings", ranking(responses=["x"], ranks=[0]), "at least 2 responses, this one has 1"),
    "fewer ranks": ("rankings", ranking(ranks=[0, 1]), "3 'responses' but 2 'ranks'"),
    "all tied": ("rankings", ranking(ranks=[1, 1, 1]), "all responses are tied"),
    "rank is a text": ("rankings", ranking(ranks=[0, "1", 2]), "rank 2 is a text (1), expected a finite number"),
    "rank is a bool": ("rankings", ranking(ranks=[0, True, 2]), "rank 2 is true or false"),
    "ranks is an object": ("rankings", ranking(ranks={"a": 0}), "'ranks' is an object, expected a list of numbers"),
    "responses is a text": ("rankings", ranking(responses="xyz"), "'responses' is a text, expected a list"),
    "empty response": ("rankings", ranking(responses=["x", " ", "z"]), "response 2 is empty"),
    "same response, other rank": (
        "rankings",
        ranking(responses=["x", "y", "x "]),
        "responses 1 and 3 are the same text with different ranks",
    ),
}


@pytest.mark.parametrize(("kind", "bad", "expected"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_named_with_file_and_line(jsonl, kind, bad, expected):
    path = jsonl(GOOD[kind], bad, GOOD[kind])
    report = check_file(path)
    assert (report.kind, report.rows) == (kind, 2)
    (problem,) = report.problems
    assert problem.startswith(f"{path}:2: ")
    assert expected in problem
    assert len(problem) < len(str(path)) + 400 and "\n" not in problem
    with pytest.raises(BadRecords, match=":2: "):
        read_records(path)


IMPLICIT = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
IMPLICIT_FAULTS = {
    "prompts differ": ({**IMPLICIT, "chosen": [user("z"), assistant("b")]}, "differ before their last turn"),
    "texts without a prompt": ({"chosen": "Human: a", "rejected": "Human: b"}, "'chosen' without a 'prompt' is a text, expected a list"),
    "ends with the user": ({**IMPLICIT, "rejected": [user("a")]}, "'rejected' ends with turn 1 of the user"),
}


@pytest.mark.parametrize(("bad", "expected"), IMPLICIT_FAULTS.values(), ids=IMPLICIT_FAULTS)
def test_faults_of_comparisons_without_a_prompt_are_named(jsonl, bad, expected):
    (problem,) = check_file(jsonl(IMPLICIT, bad)).problems
    assert ":2: " in problem and expected in problem


WHOLE_FILE_FAULTS = {
    "empty": (b"", "the file has no rows"),
    "only blank lines": (b"\n \n\r\n", "the file has no rows"),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16"),
    "Parquet": (b"PAR1\x15\x04\x15", "the Parquet file is damaged"),
    "gzip": (gzip.compress(b'{"text": "a"}\n'), "is gzip"),
    "empty JSON array": (b"\n [ ]\n", "the file has no rows"),
}


@pytest.mark.parametrize(("content", "expected"), WHOLE_FILE_FAULTS.values(), ids=WHOLE_FILE_FAULTS)
def test_a_file_that_is_no_jsonl_is_one_problem(tmp_path, content, expected):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    (problem,) = check_file(path).problems
    assert problem.startswith(f"{path}: ") and expected in problem
    with pytest.raises(BadRecords, match=expected):
        read_records(path, "texts")


def test_a_missing_file_and_a_folder_are_problems_and_not_tracebacks(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path, "none.csv", str(tmp_path / "none")):
        with pytest.raises(BadRecords, match="cannot be read"):
            read_records(path, "texts")


def test_the_five_faults_of_the_check_command_are_each_named_with_their_line(jsonl):
    path = jsonl(
        b'{"prompt": "Hi", "completion": "Hel',
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": "Hi", "complettion": "Hello."},
        {"prompt": "Hi", "completion": ""},
        {"prompt": "Hi", "responses": ["Hello."], "ranks": [0]},
        b'{"prompt": "\xff", "completion": "b"}',
    )
    shown = str(check_file(path)).splitlines()
    assert shown[0] == f"{path}: 6 rows in = 1 kept + 5 rejected: demonstrations (prompt-completion), 5 problems"
    for text, number, what in zip(shown[1:], (1, 3, 4, 5, 6), ("cut", "complettion", "empty", "at least 2", "0xff"), strict=True):
        assert text.startswith(f"{path}:{number}: ") and what in text


def test_checking_loads_neither_torch_nor_transformers_nor_datasets(jsonl):
    program = "import sys; from instructlite.data.check import check_file; check_file(sys.argv[1]); "
    program += "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program, jsonl(b"{")], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_all_problems_of_all_files_are_kept_and_twenty_are_shown(jsonl):
    first = jsonl(*[b"{"] * 30, name="a.jsonl")
    second = jsonl({"text": "a"}, b"}", name="b.jsonl")
    with pytest.raises(BadRecords) as caught:
        read_records([first, second], "texts")
    assert len(caught.value.problems) == 31 and caught.value.problems[-1].startswith(f"{second}:2: ")
    assert len(str(caught.value).splitlines()) == 21 and str(caught.value).endswith("+11 more")
    assert str(check_file(first)).endswith("the same in line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, +19 more")


def test_reading_the_wrong_file_stops_after_a_thousand_bad_rows_and_checking_counts_them_all(jsonl):
    path = jsonl({"text": "a"}, *[b"x"] * 1100)
    with pytest.raises(BadRecords) as caught:
        read_records(path)
    assert len(caught.value.problems) == 1001 and caught.value.problems[-1].endswith("stopped after 1000 bad rows")
    report = check_file(path)
    assert (report.rows_in, report.rows, report.rejected, report.found, len(report.problems)) == (1101, 1, 1100, 1100, 1000)
    assert str(report).endswith("+989 more\n+100 more")


def test_a_line_of_30_mb_is_refused_and_never_held_in_memory(jsonl):
    path = jsonl({"text": "a"}, b'{"text": "' + b"x" * 30 * 2**20 + b'"}', {"text": "b"})
    tracemalloc.start()
    report = check_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.rows == 2 and ":2: the line is longer than 8 MB" in report.problems[0]
    assert peak < 20 * 2**20


def test_memory_does_not_grow_with_the_file(jsonl):
    path = jsonl(*({"text": f"{number} " + "x" * 2000} for number in range(5000)))
    tracemalloc.start()
    assert check_file(path).rows == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20 < path.stat().st_size / 4


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'\n{"text": "a"}\n\n  \n{"text": "b"}',
        b' {"text":"a"} \n\t{"text":"b"}',
    ],
    ids=["byte order mark", "CRLF", "blank lines", "spaces"],
)
def test_harmless_differences_read_the_same(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert read_records(path) == [{"text": "a"}, {"text": "b"}]


def test_lines_end_at_line_feeds_only_and_texts_keep_their_line_breaks(jsonl):
    text = "a\u2028b\x85c\rd\te\nf"
    raw = '{"text": "a\u2028b\x85c\rd\te\\nf"}'.encode()
    assert read_records(jsonl(raw)) == [{"text": text}]


def test_control_characters_are_taken_out_and_counted(jsonl):
    path = jsonl({"text": "a\x00b\x1bc\td"}, {"text": "fine"})
    assert read_records(path)[0] == {"text": "abc\td"}
    assert check_file(path).warnings == {"control character": [f"{path}:1: held control characters"]}


def test_rows_before_the_majority_kind_do_not_mislead(jsonl):
    report = check_file(jsonl({"prompt": "Hi"}, GOOD["comparisons"], GOOD["comparisons"]))
    assert report.kind == "comparisons" and len(report.problems) == 1 and ":1: key 'chosen' is missing" in report.problems[0]


def test_the_kind_is_told_even_after_many_broken_rows(jsonl):
    report = check_file(jsonl(*[b"{"] * 40, {"wrong": 1}, GOOD["rankings"], GOOD["rankings"]))
    assert report.kind == "rankings" and report.rows == 2 and len(report.problems) == 41


def test_keys_that_fit_no_kind_get_the_list_of_kinds(jsonl):
    report = check_file(jsonl({"headline": "a", "body": "b"}))
    assert report.kind is None
    assert "'headline', 'body' fit no kind" in report.problems[0] and "demonstrations (messages)" in report.problems[0]


def test_a_wanted_kind_is_held_against_the_file(jsonl):
    (problem,) = check_file(jsonl(GOOD["demonstrations"]), "comparisons").problems
    assert "has the keys of demonstrations (prompt, completion), expected comparisons" in problem
    with pytest.raises(InstructLiteError, match="'comparison' is no kind"):
        read_records([], "comparison")


CONVERSATION = [system("Be brief."), user("a"), assistant("b"), user("c")]
NORMAL = {
    "text prompt": (demonstration(), {"prompt": [user("Hi")], "completion": "Hello."}),
    "message completion": (demonstration(prompt=CONVERSATION, completion=[assistant("d")]), {"prompt": CONVERSATION, "completion": "d"}),
    "messages": ({"messages": [*CONVERSATION, assistant("d")]}, {"prompt": CONVERSATION, "completion": "d"}),
    "messages beside a prompt": (
        {"messages": [user("a"), assistant("b")], "prompt_id": 3},
        {"prompt": [user("a")], "completion": "b", "prompt_id": 3},
    ),
    "message fields": ({"messages": [user("a") | {"name": "x"}, assistant("b")]}, {"prompt": [user("a")], "completion": "b"}),
    "comparison": (comparison(), {"prompt": [user("Hi")], "chosen": "Hello.", "rejected": "Go."}),
    "TRL comparison": (
        comparison(prompt=CONVERSATION, chosen=[assistant("x")], rejected=[assistant("y")]),
        {"prompt": CONVERSATION, "chosen": "x", "rejected": "y"},
    ),
    "implicit prompt": (IMPLICIT, {"prompt": [user("a")], "chosen": "b", "rejected": "c"}),
    "implicit prompt and an id": (IMPLICIT | {"prompt_id": 7}, {"prompt": [user("a")], "chosen": "b", "rejected": "c", "prompt_id": 7}),
    "ranking with ties": (
        ranking(ranks=[1, 0.5, 1]),
        {"prompt": [user("Hi")], "responses": ["Hello.", "Go.", "Yes?"], "ranks": [1, 0.5, 1]},
    ),
    "message responses": (
        ranking(responses=[[assistant("x")], [assistant("y")]], ranks=[1, 0]),
        {"prompt": [user("Hi")], "responses": ["x", "y"], "ranks": [1, 0]},
    ),
    "prompt": ({"prompt": CONVERSATION}, {"prompt": CONVERSATION}),
    "text beside something else": ({"text": "a", "prompts": 2}, {"text": "a", "prompts": 2}),
    "text": ({"text": " kept as it is \n"}, {"text": " kept as it is \n"}),
}


@pytest.mark.parametrize(("row", "expected"), NORMAL.values(), ids=NORMAL)
def test_every_layout_comes_out_in_the_normal_form_and_so_does_the_normal_form(jsonl, row, expected):
    path = jsonl(row | {"source": "x", "score": [1.5, None]})
    (record,) = read_records(path)
    assert record == expected | {"source": "x", "score": [1.5, None]}
    assert read_records([record]) == [record]
    assert check_file(path).notes[0:1] == ["extra keys kept: " + ", ".join(sorted(record.keys() - {*GOOD[check_file(path).kind]}))]


def test_rows_in_memory_may_mix_comparisons_and_rankings_and_bad_ones_are_numbered():
    mixed = read_records([GOOD["comparisons"], GOOD["rankings"]])
    assert [len(group["responses"]) for group in as_groups(mixed)] == [2, 3]
    with pytest.raises(BadRecords, match=r"rows:2: 'chosen' is empty"):
        read_records([GOOD["comparisons"], comparison(chosen="")])
    with pytest.raises(BadRecords, match=r"rows:1: rank 2 is a number \(nan\), expected a finite number"):
        read_records([ranking(ranks=[0, float("nan"), 1])])
    with pytest.raises(BadRecords, match="rows: there are none"):
        read_records([])


def test_several_files_are_read_one_after_the_other_each_of_its_own_kind(jsonl):
    paths = [jsonl(GOOD["rankings"], name="a.jsonl"), str(jsonl(GOOD["comparisons"], name="b.jsonl"))]
    assert [sorted(record) for record in read_records(paths)] == [["prompt", "ranks", "responses"], ["chosen", "prompt", "rejected"]]


def test_a_hub_data_set_is_read_with_its_split_and_its_rows_are_numbered(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([GOOD["comparisons"], comparison(chosen="")])

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(BadRecords, match=r"owner/some\.set:test\[:9\]:2: 'chosen' is empty"):
        read_records("owner/some.set:test[:9]")
    with pytest.raises(BadRecords):
        read_records("owner/set", "comparisons")
    assert asked == [("owner/some.set", "test[:9]"), ("owner/set", "train")]


def test_a_hub_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    def load(name, split):
        raise ConnectionError("no\nnet")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InstructLiteError, match=r"^owner/set: no such file, and the data set cannot be had from the Hub: no net$"):
        read_records("owner/set")


def test_a_comparison_is_a_group_of_two_and_ties_stay():
    groups = as_groups(read_records([GOOD["comparisons"], ranking(ranks=[2, 2, 0])]))
    assert groups == [
        {"prompt": [user("Hi")], "responses": ["Hello.", "Go."], "ranks": [0, 1]},
        {"prompt": [user("Hi")], "responses": ["Hello.", "Go.", "Yes?"], "ranks": [2, 2, 0]},
    ]
    with pytest.raises(InstructLiteError, match="record 1 is neither a comparison nor a ranking"):
        as_groups(read_records([GOOD["prompts"]]))


def rows_with_openings(openings):
    return [
        {"prompt": [system("s"), user(opening), assistant("x"), user(f"turn {number}")], "n": number}
        for number, opening in enumerate(openings)
    ]


def test_a_split_never_parts_conversations_that_open_alike():
    rng = random.Random(0)
    texts = [rng.choice(["How  are you?", "how are YOU?", " HOW ARE\nyou? "]) if n % 5 == 0 else f"Question {n % 37}" for n in range(200)]
    records_ = rows_with_openings(texts)
    parts = split_by_prompt(records_, {"train": 0.5, "judge": 0.3, "heldout": 0.2}, seed=3)
    openings = {name: {" ".join(row["prompt"][1]["content"].lower().split()) for row in part} for name, part in parts.items()}
    assert not (openings["train"] & openings["judge"] or openings["train"] & openings["heldout"] or openings["judge"] & openings["heldout"])
    assert sorted(row["n"] for part in parts.values() for row in part) == list(range(200))


def test_a_split_has_the_sizes_asked_for_and_leaves_the_rest_out():
    parts = split_by_prompt(rows_with_openings(map(str, range(100))), {"a": 0.3, "b": 25, "c": 0.1})
    assert {name: len(part) for name, part in parts.items()} == {"a": 30, "b": 25, "c": 10}


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    rows = rows_with_openings(f"q{number % 80}" for number in range(100))
    shares = {"a": 0.6, "b": 0.4}
    once = split_by_prompt(rows, shares, seed=1)
    assert split_by_prompt(rows, shares, seed=1) == once
    other_way = split_by_prompt(rows[::-1], shares, seed=1)
    assert {row["n"] for row in other_way["a"]} == {row["n"] for row in once["a"]}
    assert [row["n"] for row in once["a"]] == sorted(row["n"] for row in once["a"])
    assert {row["n"] for row in split_by_prompt(rows, shares, seed=2)["a"]} != {row["n"] for row in once["a"]}


def test_a_split_that_does_not_fit_is_refused():
    rows = rows_with_openings(["same"] * 9 + ["other"])
    with pytest.raises(InstructLiteError, match="do not fit into 10 rows"):
        split_by_prompt(rows, {"a": 0.7, "b": 0.4})
    with pytest.raises(InstructLiteError, match="do not fit"):
        split_by_prompt(rows, {"a": -0.1})
    with pytest.raises(InstructLiteError, match=r"nothing is left for '[abc]': 10 rows with 2 different prompts"):
        split_by_prompt(rows, {"a": 0.4, "b": 0.3, "c": 0.3})
    assert split_by_prompt([{"text": "x"}], {"a": 1.0}) == {"a": [{"text": "x"}]}


def test_written_records_read_back_the_same(tmp_path):
    records_ = read_records([demonstration(prompt="“Ü” \u2028 \U0001f600\r\n", source="é"), demonstration(completion="\ttab")])
    path = tmp_path / "new" / "data.jsonl"
    write_records(path, records_)
    assert path.read_bytes().count(b"\n") == 2 and "é".encode() in path.read_bytes()
    assert read_records(path) == records_


def test_the_data_hash_sees_texts_and_row_order_but_not_key_order():
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    same = [dict(reversed(row.items())) for row in rows]
    assert data_hash(rows) == data_hash(same) == data_hash(iter(rows))
    assert (
        len({data_hash(rows), data_hash(rows[::-1]), data_hash(rows[:1]), data_hash([{"prompt": "a", "n": 1}, {"prompt": "B", "n": 2}])})
        == 4
    )
    assert data_hash([{"b": 1, "a": "é"}]) == hashlib.sha256(b'{"a":"\\u00e9","b":1}\n').hexdigest()


ODD_VALUES = [
    None,
    True,
    0,
    -1.5,
    1e308,
    "",
    " ",
    "x",
    "\x00",
    "\ud800",
    "user",
    [],
    [[]],
    [None],
    {},
    {"role": "user"},
    {"": ""},
    [user("a")],
    ["a", "b"],
]


def mutate_value(rng, value):
    """The JSON value with one thing in it replaced, taken out, doubled or renamed."""
    if isinstance(value, (list, dict)) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(keys))
        match rng.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else [*value[:key], *value[key + 1 :]]
            case 1 if isinstance(value, dict):
                return {(rng.choice([k[:-1], k + "s", k.upper(), "zz"]) if k == key else k): v for k, v in value.items()}
            case 1:
                return [*value, value[key]]
            case _:
                changed = value.copy()
                changed[key] = mutate_value(rng, value[key])
                return changed
    return rng.choice(ODD_VALUES)


def mutate_bytes(rng, text):
    position = rng.randrange(len(text))
    match rng.randrange(4):
        case 0:
            return text[:position]
        case 1:
            return text[:position] + bytes([rng.randrange(256)]) + text[position + 1 :]
        case 2:
            return text[:position] + text[position + rng.randrange(1, 9) :]
        case _:
            return (
                text[:position]
                + rng.choice([b'"', b"{", b"]", b"\\u", b"\xff", b"NaN", b"\n", b"\\ud83d", b",", b"1e999"])
                + text[position:]
            )


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_line_holds_it_is_a_row_or_a_problem_and_never_a_traceback(jsonl, kind):
    rng = random.Random(kind)
    good = [
        json.loads(text)
        for text in (containers.STARTER / containers._STARTER_FILES.get(kind, f"{kind}.jsonl")).read_text("utf-8").split("\n")[:40]
        if text
    ]
    lines = []
    for _ in range(800):
        row = rng.choice(good)
        for _ in range(rng.randrange(3)):
            row = mutate_value(rng, row)
        lines.append(mutate_bytes(rng, line(row)) if rng.random() < 0.5 else line(row))
    path = jsonl(*[good[0]] * 33, *lines)
    expected = sum(1 for text in path.read_bytes().split(b"\n") if text.strip())
    report = check_file(path, kind)
    assert report.rows + len(report.problems) == expected
    assert len(report.problems) > 100 and report.rows > 100
    assert len({problem.split(": ", 1)[0] for problem in report.problems}) == len(report.problems)
    with pytest.raises(BadRecords) as caught:
        read_records(path, kind)
    assert caught.value.problems == report.problems
    str(report).encode()
