"""One reader for all: the files, the layouts of others, what becomes of other columns, and bounded memory."""

import datetime
import json
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from instructlite.data.containers import MAX_LINE_BYTES
from instructlite.data.formats import FORMATS, rows
from instructlite.data.layouts import LAYOUTS
from instructlite.data.records import as_groups, read_records, write_records
from instructlite.data.schema import Fault
from instructlite.errors import InstructLiteError

ASKED = [{"role": "user", "content": "Hi"}]
EXTRA = {"annotator": "a", "created": "2024-01-01", "category": "chat", "flags": {"harmful": False}}


def read(path, content, **options):
    """(good rows, faults) of a file with this content."""
    if not isinstance(content, bytes):
        content = "\n".join(json.dumps(row) for row in content).encode()
    path.write_bytes(content)
    items = list(rows(path, **options))
    return [item for item in items if not isinstance(item, Fault)], [item for item in items if isinstance(item, Fault)]


def node(text, role, *replies, **fields):
    return {"text": text, "role": role, "replies": list(replies), **fields}


TREE = node(
    "Hi", "prompter",
    node("Go.", "assistant", rank=1),
    node("Hello.", "assistant", node("And?", "prompter", node("Yes.", "assistant", rank=None)), rank=0),
    node("Spam", "assistant", rank=2, deleted=True),
    message_id="m", lang="en",
)  # fmt: skip

LAYOUTS_OF_OTHERS = {
    "alpaca": (
        {"instruction": "Translate.", "input": "Oui", "output": "Yes"},
        {"prompt": [{"role": "user", "content": "Translate.\n\nOui"}], "completion": "Yes"},
    ),
    "alpaca without input": ({"instruction": "Hi", "input": "", "output": "Hello."}, {"prompt": ASKED, "completion": "Hello."}),
    "alpaca with history": (
        {"instruction": "And?", "output": "Yes.", "system": "Be brief.", "history": [["Hi", "Hello."]]},
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                *ASKED,
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "And?"},
            ],
            "completion": "Yes.",
        },
    ),
    "alpaca-pairs": (
        {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "Go."},
        {"prompt": ASKED, "chosen": "Hello.", "rejected": "Go."},
    ),
    "dolly": (
        {"instruction": "Hi", "context": "A book", "response": "Hello."},
        {"prompt": [{"role": "user", "content": "Hi\n\nA book"}], "completion": "Hello."},
    ),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"prompt": [{"role": "system", "content": "s"}, *ASKED], "completion": "Hello."},
    ),
    "sharegpt-pairs": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "Go."},
        },
        {"prompt": ASKED, "chosen": "Hello.", "rejected": "Go."},
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nwith a blank line", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."},
        {"prompt": ASKED, "chosen": "Hello.\n\nwith a blank line", "rejected": "Go."},
    ),
    "comparisons as UltraFeedback has them": (
        {
            "prompt": "Hi",
            "chosen": [*ASKED, {"role": "assistant", "content": "Hello."}],
            "rejected": [*ASKED, {"role": "assistant", "content": "Go."}],
        },
        {"prompt": ASKED, "chosen": "Hello.", "rejected": "Go."},
    ),
    "order": (
        {"prompt": "Hi", "responses": ["Go.", "Hello.", "Hm."], "ranking": [1, 2, 0]},
        {"prompt": ASKED, "responses": ["Go.", "Hello.", "Hm."], "ranks": [2, 0, 1]},
    ),
    "likert": (
        {"prompt": "Hi", "responses": ["Go.", "Hello.", "Hm."], "scores": [1, 7, 1]},
        {"prompt": ASKED, "responses": ["Go.", "Hello.", "Hm."], "ranks": [1, 0, 1], "scores": [1, 7, 1]},
    ),
    "oasst-trees": (
        {"message_tree_id": "t", "tree_state": "ready", "prompt": TREE},
        {
            "prompt": ASKED, "responses": ["Go.", "Hello."], "ranks": [1, 0],
            "message_id": "m", "lang": "en", "message_tree_id": "t", "tree_state": "ready",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS_OF_OTHERS)
def test_the_layouts_of_others_come_out_in_the_normal_form_with_their_other_columns(tmp_path, name):
    row, expected = LAYOUTS_OF_OTHERS[name]
    (item,), faults = read(tmp_path / "data.jsonl", [row | EXTRA])
    assert item.record == expected | EXTRA and not faults
    assert (item.line, item.rows, item.format) == (1, 1, name.split()[0])
    assert read_records([item.record]) == [item.record]


def test_every_layout_has_a_format_name_and_a_kind():
    assert len({(layout.name, layout.kind) for layout in LAYOUTS}) == len(LAYOUTS)
    assert {"messages", "prompt-completion", "alpaca", "sharegpt", "hh-rlhf", "oasst-trees", "likert"} <= set(FORMATS)


FAULTS_OF_OTHERS = {
    "another prompt in the conversations": (
        {"prompt": "He"} | {name: [*ASKED, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")},
        "'chosen' is a conversation of its own, and its prompt is not 'prompt'",
    ),
    "no transcript": ({"chosen": "Hi there", "rejected": "x"}, "'chosen' is no transcript: it does not begin with 'Human:'"),
    "transcripts part early": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: c"},
        "'chosen' and 'rejected' differ before their last turn",
    ),
    "transcript without answer": (
        {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "'chosen', turn 2: 'content' is empty",
    ),
    "input is a list": ({"instruction": "a", "input": ["b"], "output": "c"}, "'input' is a list, expected a text"),
    "no output": ({"instruction": "a", "input": "b", "output": ""}, "'output' is empty"),
    "history is no pair": ({"instruction": "a", "output": "b", "history": [["x"]]}, "'history' 1 is no pair of instruction and answer"),
    "ShareGPT's role": ({"conversations": [{"from": "robot", "value": "a"}]}, "turn 1: unknown role 'robot'"),
    "ShareGPT's last turn": ({"conversations": [{"from": "human", "value": "a"}]}, "ends with turn 1 of the user"),
    "more scores": ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2, 3]}, "2 'responses' but 3 'scores' (one score for each"),
    "same text, other scores": (
        {"prompt": "a", "responses": ["b", "b"], "scores": [1, 2]},
        "responses 1 and 2 are the same text with different scores",
    ),
    "nothing ranked": ({"message_tree_id": "t", "prompt": node("a", "prompter")}, "no prompt with two ranked replies"),
    "tree without text": ({"message_tree_id": "t", "prompt": {"role": "prompter"}}, "'prompt', turn 1: 'content' is null, expected a text"),
}


@pytest.mark.parametrize("name", FAULTS_OF_OTHERS)
def test_faults_in_the_layouts_of_others_are_named(tmp_path, name):
    row, expected = FAULTS_OF_OTHERS[name]
    good, (fault,) = read(tmp_path / "data.jsonl", [row])
    assert not good and fault.problem.startswith(f"{tmp_path / 'data.jsonl'}:1: ") and expected in fault.problem


def test_a_tree_gives_a_demonstration_for_each_prompt_when_demonstrations_are_wanted(tmp_path):
    good, _ = read(tmp_path / "trees.jsonl", [{"message_tree_id": "t", "prompt": TREE}], kind="demonstrations")
    assert [(len(row.record["prompt"]), row.record["completion"], row.rows) for row in good] == [(1, "Hello.", 1), (3, "Yes.", 0)]


def test_messages_that_stand_together_are_a_tree_and_every_row_is_accounted_for(tmp_path):
    def message(name, parent, text, role, rank=None, tree="t"):
        return {"message_id": name, "parent_id": parent, "message_tree_id": tree, "text": text, "role": role, "rank": rank}

    table = [
        message("1", None, "Hi", "prompter"),
        message("2", "1", "Go.", "assistant", 1),
        message("3", "1", "Hello.", "assistant", 0),
        message("4", None, "Alone", "prompter", tree="u"),
        message("6", "5", "Stray", "assistant", tree="v"),
    ]
    (ranking,), (alone, stray) = read(tmp_path / "messages.jsonl", table)
    assert ranking.record == {"prompt": ASKED, "responses": ["Go.", "Hello."], "ranks": [1, 0], "message_id": "1", "message_tree_id": "t"}
    assert (ranking.line, ranking.rows, alone.line, stray.line) == (1, 3, 4, 5)
    assert "two ranked replies" in str(alone) and "answers 5, which is not beside it" in str(stray)


def test_scored_answers_that_stand_together_are_a_ranking_for_each_annotator(tmp_path):
    def scored(prompt, response, score, annotator, **more):
        return {"prompt": prompt, "response": response, "score": score, "annotator": annotator, **more}

    table = [
        scored("Hi", "Go.", 1, "a", created=1),
        scored("Hi", "Hello.", 7, "a", created=2),
        scored("Hi", "Go.", 5, "b", created=3),
        scored("Hi", "Hello.", 4, "b", created=3),
        scored("Ho", "Hello.", 4, "b"),
    ]
    (first, second), (lone,) = read(tmp_path / "scores.jsonl", table)
    both = {"prompt": ASKED, "responses": ["Go.", "Hello."]}
    assert first.record == both | {"ranks": [1, 0], "scores": [1, 7], "annotator": "a", "created": [1, 2]}
    assert second.record == both | {"ranks": [0, 1], "scores": [5, 4], "annotator": "b", "created": 3}
    assert (first.line, first.rows, second.rows, lone.line, lone.rows) == (1, 4, 0, 5, 1)
    assert "only scored answer" in str(lone)


def test_a_prompt_scored_without_end_is_read_in_bounded_parts(tmp_path):
    good, faults = read(tmp_path / "scores.jsonl", [{"prompt": "Hi", "response": f"{n}", "score": n} for n in range(2500)])
    assert [len(row.record["responses"]) for row in good] == [1000, 1000, 500] and not faults


def test_the_format_may_be_named(tmp_path):
    content = [{"message_tree_id": "t", "prompt": TREE, "text": "other"}]
    (row,), _ = read(tmp_path / "data.jsonl", content, format="texts")
    assert row.record["text"] == "other" and row.kind == "texts"
    with pytest.raises(InstructLiteError, match="'alpca' is no format of rows: messages, "):
        read(tmp_path / "data.jsonl", content, format="alpca")
    with pytest.raises(InstructLiteError, match="the format 'alpaca' has no rankings"):
        read(tmp_path / "data.jsonl", content, format="alpaca", kind="rankings")


# --- files ---

TABLE = [
    {"prompt": "Hi", "completion": 'He said "Hello",\nand left.', "annotator": "é"},
    {"prompt": "Ho", "completion": "b", "annotator": ""},
]


def quoted(cell):
    return '"' + cell.replace('"', '""') + '"'


FILES = {
    "JSONL": "\n".join(map(json.dumps, TABLE)),
    "JSON": json.dumps(TABLE),
    "indented JSON": "\ufeff" + json.dumps(TABLE, indent=2),
    "CSV": "\n".join(["prompt,completion,annotator", *(",".join(map(quoted, row.values())) for row in TABLE)]),
    "CSV with a byte order mark": "\ufeff"
    + "\r\n".join(["prompt,completion,annotator", *(",".join(map(quoted, row.values())) for row in TABLE)]),
    "CSV with semicolons": "\n".join(["prompt;completion;annotator", *(";".join(map(quoted, row.values())) for row in TABLE), ""]),
    "TSV": "\n".join(["prompt\tcompletion\tannotator", "", *("\t".join(map(quoted, row.values())) for row in TABLE)]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows_whatever_its_name(tmp_path, name):
    good, faults = read(tmp_path / "data.jsonl", FILES[name].encode())
    assert [row.record for row in good] == [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in TABLE]
    assert not faults


def test_a_json_array_names_the_line_where_each_object_begins_and_where_it_ends_badly(tmp_path):
    content = b'[\n{"text": "a"},\n\n {"text":\n "],[{"}, 3,\n{"text": NaN}\n,{"text": "b"}\n] {"text": "c"}'
    good, faults = read(tmp_path / "data.json", content)
    assert [(row.line, row.record["text"]) for row in good] == [(2, "a"), (4, "],[{"), (7, "b")]
    assert [(fault.line, str(fault)[:20]) for fault in faults] == [
        (5, "the row is not an ob"), (6, "holds NaN, which is "), (8, "the array has ended,"),
    ]  # fmt: skip
    for broken in (
        b'[{"text": "a"},\n{"text": "b"]',
        b'[{"text": "a"},\n{"text": "b}',
        b'[{"text": "a"},\n{"text": ["b"}}, {"text": "c"}]',
    ):
        good, (fault,) = read(tmp_path / "data.json", broken)
        assert len(good) == 1 and fault.line == 2 and "brackets or quotes that do not match" in str(fault)


def test_a_json_array_is_never_held_in_memory(tmp_path):
    path = tmp_path / "data.json"
    with path.open("w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": f"{number} " + "x" * 2000}) for number in range(5000)) + ",\n")
        file.write(
            '{"text": ' + json.dumps(["x" * 2000] * 10_000) + '},\n{"text": "the last"},\n{"text": "' + "x" * 2 * MAX_LINE_BYTES + '"}]'
        )
    tracemalloc.start()
    texts, faults = 0, []
    for item in rows(path):
        if isinstance(item, Fault):
            faults.append((item.line, str(item)))
        else:
            texts, last = texts + 1, item.record["text"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (texts, last) == (5001, "the last") and peak < 40 * 2**20 < path.stat().st_size
    assert faults[0] == (5001, "the object is longer than 8 MB (is it one record?)") and faults[1][0] == 5003 and len(faults) == 2


def test_lists_and_numbers_of_a_table_are_json_in_its_cells(tmp_path):
    content = (
        'prompt,responses,scores,year\n"[{""role"": ""user"", ""content"": ""Hi""}]","[""a"", ""b""]","[1, 2]",1999\nHi,a,"[1]",2000\n'
    )
    (row,), (fault,) = read(tmp_path / "data.csv", content.encode())
    assert row.record == {"prompt": ASKED, "responses": ["a", "b"], "ranks": [1, 0], "scores": [1, 2], "year": "1999"}
    assert fault.line == 3 and str(fault).startswith("'responses': broken JSON at column 1")


FAULTS_OF_TABLES = {
    "cells": (b"prompt,completion\na,b,c\n", 2, "has 3 cells, and the header 2"),
    "quote": (b'prompt,completion\na,"b\n', 2, "broken CSV: unexpected end of data"),
    "quote inside": (b'prompt,completion\na,"b"c\n', 2, "broken CSV: ',' expected after '\"'"),
    "not UTF-8": (b"prompt,completion\na,b\xe9\n", 2, "'completion': byte 0xe9 is not UTF-8"),
    "column twice": (b"prompt,completion,prompt\na,b,c\n", 0, "the column 'prompt' is there twice"),
    "header only": (b"prompt,completion\n", 0, "the file has no rows"),
    "empty cell": (b"prompt,completion\na,\n", 2, "'completion' is empty"),
    "huge cell": (b"prompt,completion\na," + b"x" * (MAX_LINE_BYTES + 1) + b"\n", 2, "broken CSV: field larger than field limit"),
}


@pytest.mark.parametrize("name", FAULTS_OF_TABLES)
def test_faults_of_tables_are_named_with_the_line_where_the_row_begins(tmp_path, name):
    content, number, expected = FAULTS_OF_TABLES[name]
    good, (fault,) = read(tmp_path / "data.csv", content)
    assert not good and (fault.line, fault.rows) == (number, int(number > 0)) and expected in str(fault)


def test_parquet_is_read_with_times_as_text_and_its_gaps_as_null(tmp_path):
    path = tmp_path / "data.parquet"
    when = datetime.datetime(2024, 1, 1, 12)
    table = {
        "prompt": ["Hi", "Ho"],
        "completion": ["a", None],
        "created": [when, when],
        "score": [1.5, float("nan")],
        "raw": [b"\xff", b""],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    row, fault = rows(path)
    assert row.record == {"prompt": ASKED, "completion": "a", "created": "2024-01-01T12:00:00", "score": 1.5, "raw": "/w=="}
    assert fault.problem == f"{path}:2: 'completion' is null, expected a text or a list with one message of the assistant"
    assert fault.raw["score"] is None
    write_records(tmp_path / "again.jsonl", [row.record])
    assert read_records(tmp_path / "again.jsonl") == [row.record]


def test_damaged_parquet_is_a_problem(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{n} " + "x" * 50 for n in range(3000)]}), path, row_group_size=1000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\0" * 2000
    path.write_bytes(content)
    found = list(rows(path))
    assert len(found) < 3000 and "damaged" in found[-1].problem
    path.write_bytes(content[:-20])
    (fault,) = rows(path)
    assert fault.line == 0 and "the Parquet file is damaged" in str(fault)


def test_saved_data_sets_are_read_without_the_hub(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": "Hi", "completion": "a"}, {"prompt": "Hi", "completion": ""}])
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "saved"))
    data.save_to_disk(str(tmp_path / "one"))
    for name in ("saved", "one"):
        row, fault = rows(tmp_path / name)
        assert row.record == {"prompt": ASKED, "completion": "a"} and fault.problem.startswith(
            f"{tmp_path / name}:2: 'completion' is empty"
        )
    assert len(list(rows(f"{tmp_path}/saved:test"))) == 1
    (fault,) = rows(f"{tmp_path}/saved:dev")
    assert "has no split 'dev', but train, test" in fault.problem


def test_of_a_directory_each_file_is_read_by_itself_and_test_files_are_left_alone(tmp_path):
    write_records(tmp_path / "set" / "train-0.jsonl", [{"prompt": "Hi", "completion": ""}])
    (tmp_path / "set" / "train-1.csv").write_text("instruction,output\nHi,a\n")
    write_records(tmp_path / "set" / "test.jsonl", [{"text": "b"}])
    fault, row = rows(tmp_path / "set")
    assert fault.problem.startswith(f"{tmp_path / 'set' / 'train-0.jsonl'}:1: 'completion' is empty") and row.format == "alpaca"
    (row,) = rows(f"{tmp_path / 'set'}:test")
    assert row.record == {"text": "b"} and row.file == str(tmp_path / "set" / "test.jsonl")
    (fault,) = rows(f"{tmp_path / 'set'}:dev")
    assert fault.problem == f"{tmp_path / 'set'}:dev: cannot be read: is a directory without data"


# --- what the reward model sees ---


def test_likert_scores_rankings_and_comparisons_of_the_same_data_give_the_reward_model_the_same_pairs(tmp_path):
    from instructlite.training.reward import Collator

    answers = {"Hi": [("Hello.", 7), ("Go.", 1), ("Hm.", 4)], "Ho": [("a", 2), ("b", 2), ("c", 5), ("d", 1)], "He": [("x", 1), ("y", 3)]}
    likert = [{"prompt": p, "responses": [t for t, _ in a], "scores": [s for _, s in a]} for p, a in answers.items()]
    single = [{"prompt": p, "response": t, "score": s} for p, a in answers.items() for t, s in a]
    ranked = [{"prompt": p, "responses": [t for t, _ in a], "ranks": [-s for _, s in a]} for p, a in answers.items()]
    pairs = [
        {"prompt": p, "chosen": first, "rejected": second}
        for p, a in answers.items() for first, one in a for second, two in a if one > two
    ]  # fmt: skip

    def pairs_of(content):
        """(prompt, better, worse) as the loss pairs the rows of the batch that the reward trainer's collator makes."""
        records = [row.record for row in read(tmp_path / "data.jsonl", content)[0]]
        groups = as_groups(records)
        batch = Collator(0)([{"responses_ids": [[1]] * len(g["responses"]), "ranks": [float(rank) for rank in g["ranks"]]} for g in groups])
        texts = [(g["prompt"][0]["content"], text) for g in groups for text in g["responses"]]
        group, rank = batch["groups"].tolist(), batch["ranks"].tolist()
        span = range(len(texts))
        return sorted((*texts[i], texts[j][1]) for i in span for j in span if group[i] == group[j] and rank[i] < rank[j])

    expected = sorted((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs)
    assert pairs_of(likert) == pairs_of(single) == pairs_of(ranked) == pairs_of(pairs) == expected
