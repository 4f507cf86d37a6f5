"""`data check` names every fault with its line, loses no row, and writes a clean copy."""

import json
import os
import random

import pytest

from instructlite.data.check import Options, check_file, check_files
from instructlite.data.records import read_records
from instructlite.data.repeats import Table
from instructlite.errors import InstructLiteError

DEMONSTRATION = {"prompt": "Hi", "completion": "Hello."}
COMPARISON = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}
RANKING = {"prompt": "Hi", "responses": ["Hello.", "Go.", "Yes?"], "ranks": [0, 2, 1]}
LIKERT = {"prompt": "Hi", "responses": ["Hello.", "Go."], "scores": [7, 1]}


def line(row):
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def write(path, *lines):
    path.write_bytes(b"".join(line(row) + b"\n" for row in lines))
    return path


def turns(*roles):
    return {"messages": [{"role": role, "content": f"turn {number}"} for number, role in enumerate(roles)]}


# One fault a file. Where it is on a line, that is line 2; the first line is good and says what the file is.
BROKEN = {
    "D1 cut line": ([DEMONSTRATION, b'{"prompt": "Hi", "compl'], 2, "broken JSON at column"),
    "D1 trailing comma": ([DEMONSTRATION, b'{"prompt": "Hi", "completion": "Hello.",}'], 2, "broken JSON at column"),
    "D2 empty file": ([], 0, "the file has no rows"),
    "D3 Parquet by a wrong name": ([b"PAR1\x00\x00"], 0, "the Parquet file is damaged"),
    "D3 gzip": ([b"\x1f\x8b\x08\x00"], 0, "is gzip, expected UTF-8 text or Parquet"),
    "D3 JSON over several lines": ([b"{", b'"prompt": "Hi"', b"}"], 0, "is JSON over several lines, expected one object a line"),
    "D4 wrong type": ([DEMONSTRATION, {"prompt": 4, "completion": "b"}], 2, "'prompt' is a number, expected a text or a list of messages"),
    "D5 misspelt key": ([DEMONSTRATION, {"promt": "Hi", "completion": "b"}], 2, "key 'prompt' is missing (rename 'promt')"),
    "D6 extra keys": ([DEMONSTRATION, DEMONSTRATION | {"prompt": "Ho", "zz": 1}], None, "extra keys kept: zz"),
    "D7 mixed layouts": ([DEMONSTRATION, turns("user", "assistant")], 2, "(messages), expected demonstrations (prompt, completion)"),
    "D8 copy": ([DEMONSTRATION, DEMONSTRATION], 2, "repeats {path}:1"),
    "D8 contradiction": ([COMPARISON, {"prompt": "Hi", "chosen": "Go.", "rejected": "Hello."}], 2, "contradicts {path}:1"),
    "D9 leak": ([DEMONSTRATION, {"prompt": "HELD  out?", "completion": "b"}], 2, "its prompt is that of {heldout}:1"),
    "D12 Latin-1": ([DEMONSTRATION, b'{"prompt": "caf\xe9", "completion": "b"}'], 2, "byte 16 (0xe9) is not UTF-8"),
    "D12 UTF-16": (['{"text": "a"}'.encode("utf-16")], 0, "is UTF-16"),
    "D13 surrogate": ([DEMONSTRATION, b'{"prompt": "a", "completion": "\\ud800"}'], 2, "'completion' holds half of a character"),
    "D13 NUL": ([DEMONSTRATION, {"prompt": "a\0", "completion": "b"}], 2, "held control characters"),
    "D14 huge line": ([DEMONSTRATION, b'{"prompt": "' + b"x" * 9 * 2**20 + b'"}'], 2, "the line is longer than 8 MB"),
    "D15 key twice": ([DEMONSTRATION, b'{"prompt": "a", "prompt": "b", "completion": "c"}'], 2, "key 'prompt' is given twice"),
    "D16 NaN": ([LIKERT, b'{"prompt": "a", "responses": ["b", "c"], "scores": [NaN, 1]}'], 2, "holds NaN"),
    "D16 text for a score": ([LIKERT, LIKERT | {"scores": [7, "4"]}], 2, "score 2 is a text (4), expected a finite number"),
    "D16 beyond the scale": ([LIKERT, LIKERT | {"scores": [8, 1]}], 2, "score 8 is not on the scale from 1 to 7"),
    "D17 one answer": ([RANKING, RANKING | {"responses": ["a"], "ranks": [0]}], 2, "a ranking needs at least 2 responses"),
    "D17 all tied": ([RANKING, RANKING | {"ranks": [1, 1, 1]}], 2, "all responses are tied"),
    "D18 ties": ([RANKING, RANKING | {"prompt": "Ho", "ranks": [0, 0, 1]}], None, "tied pairs, from which nothing is learnt: 1 of 6"),
    "D19 fewer ranks": ([RANKING, RANKING | {"ranks": [0, 1]}], 2, "3 'responses' but 2 'ranks'"),
    "D19 no permutation": (
        [{"prompt": "a", "responses": ["b", "c"], "ranking": [1, 0]}, {"prompt": "a", "responses": ["b", "c"], "ranking": [1, 1]}],
        2,
        "does not name each of the 2 responses once",
    ),
    "D19 out of range": (
        [{"prompt": "a", "responses": ["b", "c"], "ranking": [1, 0]}, {"prompt": "a", "responses": ["b", "c"], "ranking": [1, 2]}],
        2,
        "'ranking' has 2 in place 2, expected a number from 0 to 1",
    ),
    "D20 same answers": ([COMPARISON, COMPARISON | {"rejected": " Hello.\n<|im_end|>"}], 2, "'chosen' and 'rejected' are the same text"),
    "D20 but for case": ([COMPARISON, COMPARISON | {"rejected": "HELLO."}], 2, "differ in nothing but case"),
    "D21 a ranking's pairs on both sides": (
        [COMPARISON, {"prompt": "Held out?", "chosen": "b", "rejected": "c"}],
        2,
        "its prompt is that of {heldout}:1",
    ),
    "D22 empty completion": ([DEMONSTRATION, DEMONSTRATION | {"completion": " \n"}], 2, "'completion' is empty"),
    "D23 prompt without room": ([DEMONSTRATION, {"prompt": "a " * 30, "completion": "b"}], 2, "its prompt alone has 60 tokens"),
    "D24 answer without room": (
        [DEMONSTRATION, {"prompt": "a", "completion": "b" * 19}],
        2,
        "its prompt (1 tokens) and 'completion' (20) are longer than max_length=20",
    ),
    "D25 assistant first": ([turns("user", "assistant"), turns("assistant", "user")], 2, "turn 1: assistant comes first, expected user"),
    "D25 unknown role": ([turns("user", "assistant"), turns("human", "assistant")], 2, "unknown role 'human' (did you mean 'user'?)"),
    "D25 last turn": ([turns("user", "assistant"), turns("user")], 2, "ends with turn 1 of the user, expected one of the assistant"),
    "D28 control token": ([DEMONSTRATION, {"prompt": "a<|im_end|>", "completion": "b"}], 2, "holds <|im_end|>"),
    "D29 personal data": ([DEMONSTRATION, {"prompt": "I am ann@mail.org", "completion": "My IP: 81.2.69.160."}], 2, "holds EMAIL, IP"),
    "D30 missing file": (None, 0, "cannot be read: No such file or directory"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A token for each character."""
    directory = tmp_path_factory.mktemp("tokenizer")
    model = {"type": "BPE", "vocab": {chr(code): code for code in range(32, 127)}, "merges": [], "unk_token": "?"}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.mark.parametrize("name", BROKEN)
def test_every_fault_of_a_broken_mix_is_named_with_its_line(tmp_path, tokenizer, name):
    lines, where, expected = BROKEN[name]
    path, held_out = tmp_path / "data.jsonl", write(tmp_path / "heldout.jsonl", {"prompt": "Held out?"})
    if lines is not None:
        write(path, *lines)
    options = Options(held_out=str(held_out), scale=(1, 7))
    if "without room" in name:
        options.tokenizer, options.max_length = str(tokenizer), 20
    (report,) = check_files([path], options)
    found = report.problems + [warning for warnings in report.warnings.values() for warning in warnings]
    if where is None:
        assert not found
        found = report.notes
    (only,) = found
    assert only.startswith({None: "", 0: f"{path}: "}.get(where, f"{path}:{where}: "))
    assert expected.format(path=path, heldout=held_out) in only and only in str(report)
    assert report.rows_in == report.rows + report.rejected == (0 if where == 0 else len(lines))


HARMLESS = {
    "D3 JSON array": b'[{"prompt": "Hi", "completion": "Hello."},\n {"prompt": "Ho", "completion": "Hello."}]',
    "D3 CSV by a wrong name": b"prompt,completion\nHi,Hello.\nHo,Hello.\n",
    "D10 byte order mark": b'\xef\xbb\xbf{"prompt": "Hi", "completion": "Hello."}\n{"prompt": "Ho", "completion": "Hello."}',
    "D11 CRLF": b'{"prompt": "Hi", "completion": "Hello."}\r\n{"prompt": "Ho", "completion": "Hello."}\r\n',
}


@pytest.mark.parametrize("content", HARMLESS.values(), ids=HARMLESS)
def test_what_looks_odd_but_is_clear_is_read_without_a_word(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    report = check_file(path)
    assert (report.rows, report.found, report.warnings, report.notes) == (2, 0, {}, [])


def test_a_tokenizer_without_a_template_or_without_a_length_is_one_line(tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl", DEMONSTRATION)
    with pytest.raises(InstructLiteError, match="give both: --tokenizer MODEL --max-length"):
        check_files([path], Options(tokenizer=str(tokenizer)))
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(InstructLiteError, match="no tokenizer.json"):
        check_files([path], Options(tokenizer=str(bare), max_length=9))
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(InstructLiteError, match="has no chat template"):
        check_files([path], Options(tokenizer=str(bare), max_length=9))
    (bare / "tokenizer_config.json").write_text("{")
    with pytest.raises(InstructLiteError, match="broken JSON"):
        check_files([path], Options(tokenizer=str(bare), max_length=9))


def test_a_file_of_which_nothing_is_left_for_training_is_a_problem(tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl", {"prompt": "a" * 30, "completion": "b"}, {"prompt": "b" * 30, "completion": "b"})
    (report,) = check_files([path], Options(tokenizer=str(tokenizer), max_length=20))
    assert report.problems == [f"{path}: all rows are longer than max_length=20 tokens"]


def test_a_file_that_changes_while_it_is_read_is_a_problem(tmp_path):
    path = write(tmp_path / "data.jsonl", *[DEMONSTRATION | {"prompt": str(number)} for number in range(2000)])

    def meddle(file, count):
        with path.open("ab") as handle:
            handle.write(b"\n")

    (report,) = check_files([path], progress=meddle)
    assert report.problems == [f"{path}: changed while it was read (check it again when nothing writes to it)"]


def test_strict_makes_problems_of_warnings(tmp_path):
    path = write(tmp_path / "data.jsonl", DEMONSTRATION, DEMONSTRATION)
    (report,) = check_files([path], Options(strict=True))
    assert report.problems == [f"{path}:2: repeats {path}:1"] and not report.warnings and report.rejected == 1


def test_two_annotators_who_judge_the_same_are_no_copy_and_two_who_do_not_are_no_contradiction(tmp_path):
    other_way = {"prompt": "Hi", "chosen": "Go.", "rejected": "Hello."}
    judged = [COMPARISON | {"annotator": "a"}, COMPARISON | {"annotator": "b"}, other_way | {"annotator": "c"}]
    assert not check_file(write(tmp_path / "fine.jsonl", *judged)).warnings
    path = write(tmp_path / "data.jsonl", *judged, other_way | {"annotator": "b"}, COMPARISON | {"annotator": "a", "created": 2})
    assert check_file(path).warnings == {"contradicts": [f"{path}:4: contradicts {path}:2"], "repeats": [f"{path}:5: repeats {path}:1"]}


def test_a_ranking_written_in_another_order_is_a_copy_and_ranked_otherwise_a_contradiction(tmp_path):
    shuffled = {"prompt": "Hi", "responses": ["Yes?", "Hello.", "Go."], "ranks": [2, 1, 3]}
    path = write(tmp_path / "data.jsonl", RANKING, shuffled, shuffled | {"ranks": [0, 1, 2]})
    assert check_file(path).warnings == {"repeats": [f"{path}:2: repeats {path}:1"], "contradicts": [f"{path}:3: contradicts {path}:1"]}


def test_copies_are_found_across_files(tmp_path):
    one, two = (write(tmp_path / name, DEMONSTRATION) for name in ("one.jsonl", "two.jsonl"))
    first, second = check_files([tmp_path])
    assert not first.warnings and second.warnings == {"repeats": [f"{two}:1: repeats {one}:1"]}


def test_a_table_of_rows_seen_grows_and_stops_at_its_size():
    rng = random.Random(1)
    keys = list(dict.fromkeys(rng.choice([rng.getrandbits(64), rng.randrange(1, 5000)]) for _ in range(20_000)))
    table = Table(most=10_000)
    for number, key in enumerate(keys):
        table.add(key, number)
        table.add(key, 0)
    assert all(table.get(key) == number for number, key in enumerate(keys[:10_000]))
    assert table.count == 10_000 and not any(map(table.get, keys[10_000:]))


def test_rows_that_say_the_same_fault_are_shown_together(tmp_path):
    path = write(tmp_path / "data.jsonl", DEMONSTRATION, *[{"prompt": "Hi", "completion": ""}] * 30, b"{")
    shown = str(check_file(path)).splitlines()
    assert shown[1:4] == [
        f"{path}:2: 'completion' is empty (fill it or remove the row)",
        "  the same in line 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, +19 more",
        f"{path}:32: broken JSON at column 2: Expecting property name enclosed in double quotes (is the line cut?), at … '{{'",
    ]


def test_a_clean_copy_holds_the_good_rows_and_the_reason_of_every_other_one(tmp_path):
    data = write(
        tmp_path / "data.jsonl", DEMONSTRATION | {"annotator": "a", "flags": [1]}, b'{"prompt": "\xff"}', DEMONSTRATION, {"prompt": "Hi"}
    )
    copy = tmp_path / "new" / "clean"
    (report,) = check_files([data], fix=copy)
    assert sorted(os.listdir(copy)) == ["data.jsonl", "rejected.jsonl"]
    kept = [json.loads(text) for text in (copy / "data.jsonl").read_text().splitlines()]
    assert kept == [{"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello.", "annotator": "a", "flags": [1]}, kept[1]]
    rejected = [json.loads(text) for text in (copy / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"], row["row"]) for row in rejected] == [
        (2, "byte 13 (0xff) is not UTF-8 (Latin-1, perhaps: save the file as UTF-8)", '{"prompt": "\\xff"}'),
        (4, "key 'completion' is missing (found: prompt)", {"prompt": "Hi"}),
    ]
    assert (report.rows_in, report.rows, report.rejected) == (4, 2, 2)
    assert len(read_records(copy / "data.jsonl")) == 2


def test_repeats_leave_the_clean_copy_unless_they_are_to_be_kept(tmp_path):
    data = write(tmp_path / "data.jsonl", COMPARISON, COMPARISON, {"prompt": "Hi", "chosen": "Go.", "rejected": "Hello."})
    (report,) = check_files([data], fix=tmp_path / "one")
    assert (report.rows, report.rejected, report.found) == (1, 2, 0)
    (report,) = check_files([data], Options(keep_repeats=True), fix=tmp_path / "two")
    assert (report.rows, report.rejected, report.found) == (3, 0, 0)


def test_a_clean_copy_overwrites_nothing_and_files_of_one_name_get_their_own(tmp_path):
    (tmp_path / "a").mkdir()
    files = [write(tmp_path / "a" / "data.jsonl", DEMONSTRATION), write(tmp_path / "data.jsonl", COMPARISON)]
    check_files(files, fix=tmp_path / "clean")
    assert sorted(os.listdir(tmp_path / "clean")) == ["data-2.jsonl", "data.jsonl"]
    for directory in (tmp_path / "clean", tmp_path):
        with pytest.raises(InstructLiteError, match="data.jsonl is there already"):
            check_files(files, fix=directory)
    assert (tmp_path / "data.jsonl").read_bytes() == line(COMPARISON) + b"\n"


def test_an_interrupted_clean_copy_leaves_nothing(tmp_path):
    data = write(tmp_path / "data.jsonl", DEMONSTRATION)

    def interrupt(file, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_files([data], fix=tmp_path / "clean", progress=interrupt)
    assert os.listdir(tmp_path / "clean") == []


# --- whatever comes: 10,000 lines ---

ODD = [None, True, 0, -1.5, 1e308, "", " ", "x", "\0", "\ud800", "user", [], [[]], {}, {"role": "user"}, {"": ""}, ["a", "b"], 10**400]
ODD_BYTES = [b'"', b"{", b"]", b"\\u", b"\xff", b"NaN", b"\n", b"\\ud83d", b",", b"1e999", b"[" * 2000, b"\x00", b"\xef\xbb\xbf", b"-"]


def mutated(rng, value):
    """The JSON value with one thing in it replaced, taken out, doubled or renamed."""
    if not isinstance(value, (list, dict)) or not value or rng.random() < 0.2:
        return rng.choice(ODD)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    act = rng.randrange(6)
    if act == 0:
        return {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value[:key] + value[key + 1 :]
    if act == 1:
        renamed = (
            {(rng.choice([k[:-1], k + "s", k.upper()]) if k == key else k): v for k, v in value.items()}
            if isinstance(value, dict)
            else None
        )
        return renamed or [*value, rng.choice(ODD)]
    changed = value.copy()
    changed[key] = mutated(rng, value[key])
    return changed


def damaged(rng, text):
    place = rng.randrange(len(text))
    return rng.choice([
        lambda: text[:place],
        lambda: text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :],
        lambda: text[:place] + text[place + rng.randrange(1, 9) :],
        lambda: text[:place] + rng.choice(ODD_BYTES) + text[place:],
    ])()  # fmt: skip


TREE = {
    "message_tree_id": "t",
    "prompt": {
        "message_id": "t", "text": "Hi", "role": "prompter", "replies": [
            {"message_id": "a", "text": "Hello.", "role": "assistant", "rank": 0, "replies": []},
            {"message_id": "b", "text": "Go.", "role": "assistant", "rank": 1, "replies": []},
        ],
    },
}  # fmt: skip
SEEDS = {
    "messages": turns("system", "user", "assistant", "user", "assistant"),
    "prompt-completion": DEMONSTRATION,
    "chosen-rejected": COMPARISON | {"annotator": "a"},
    "hh-rlhf": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "ranks": RANKING,
    "order": {"prompt": "Hi", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]},
    "likert": LIKERT,
    "alpaca": {"instruction": "Hi", "input": "about", "output": "Hello.", "history": [["a", "b"]]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "oasst-trees": TREE,
    "oasst-messages": {"message_id": "t", "parent_id": None, "text": "Hi", "role": "prompter", "message_tree_id": "t", "rank": None},
    "scored-answers": {"prompt": "Hi", "response": "Hello.", "score": 3, "annotator": "a"},
}


def mutations(rng, seed, count):
    """Lines without a line feed inside, so that their number is known; two in three of them are broken somehow."""
    for _ in range(count):
        row = seed
        for _ in range(rng.randrange(3)):
            row = mutated(rng, row)
        text = line(row)
        text = damaged(rng, text) if rng.random() < 0.4 else text
        yield text.replace(b"\n", b" ") or b"-"


@pytest.mark.parametrize("name", SEEDS)
def test_of_10_000_mutated_lines_none_raises_hangs_or_vanishes(tmp_path, name):
    rng = random.Random(name)
    lines = [text for text in [line(SEEDS[name])] * 33 + list(mutations(rng, SEEDS[name], 834)) if text.strip()]
    path = write(tmp_path / "data.jsonl", *lines)
    (report,) = check_files([path], Options(scale=(0, 10)), fix=tmp_path / "clean")
    assert report.rows_in == report.rows + report.rejected == len(lines)
    rejected = [json.loads(text) for text in (tmp_path / "clean" / "rejected.jsonl").read_bytes().split(b"\n") if text]
    assert sum(row["rows"] for row in rejected) == report.rejected > 300
    clean = tmp_path / "clean" / "data.jsonl"
    if clean.exists():
        assert len(read_records(clean)) == report.records
    str(report).encode()


@pytest.mark.parametrize("seed", range(3))
def test_mutated_arrays_and_tables_lose_no_row_that_can_be_told_apart(tmp_path, seed):
    rng = random.Random(seed)
    for number in range(150):
        cells = [[f"p{n}", rng.choice(["x", 'q"q', "a\nb", "", "é", "\u2028"])] for n in range(8)]
        objects = [{"prompt": prompt, "completion": said} for prompt, said in cells]
        array = b"[" + b",\n".join(map(line, objects)) + b"]"
        table = "\n".join(["prompt,completion", *(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells)]).encode()
        for name, content in {"array.json": array, "table.csv": table}.items():
            path = tmp_path / name
            broken = damaged(rng, content) if number else content
            path.write_bytes(broken)
            report = check_file(path)
            assert report.rows_in == report.rows + report.rejected
            # Of a table that was cut, or of two cells that became one, nobody can tell.
            assert report.rows_in == 8 or report.problems or name == "table.csv", broken
