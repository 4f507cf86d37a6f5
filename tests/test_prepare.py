"""`prepare` from files to files: every row accounted for, nothing in two parts, and a report that says so."""

import html.parser
import json
import random
import subprocess
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

from instructlite.cli import app, main
from instructlite.commands.data import PREPARE_OPTIONS
from instructlite.data.containers import STARTER
from instructlite.data.preparing.duplicates import folded
from instructlite.data.preparing.prepare import PrepareOptions, prepare
from instructlite.data.records import opening, read_records, write_records
from instructlite.errors import InstructLiteError

pytest.importorskip("rensa")
pytest.importorskip("phonenumbers")
PREFERENCES = ("comparisons", "rankings")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]  # splitlines would cut at a U+2028


def check_counts(report, directory):
    """Rows in = rows kept + rows rejected, in every step, in the files and for the whole."""
    rejected = Counter(row["step"] for row in lines(directory / "rejected.jsonl"))
    for before, step in zip([None, *report.steps], report.steps, strict=False):
        assert step.rows_in == step.kept + sum(step.rejected.values()), step.name
        if before is not None and before.name != "read":
            assert step.rows_in == before.kept, step.name
        if step.name != "read":
            assert rejected[step.name] == sum(step.rejected.values()), step.name
    assert report.records == report.kept + sum(rejected.values()) - rejected["read"]
    written = {name: rows for name, rows in report.files.items() if not name.endswith("prompts.jsonl")}
    assert sum(written.values()) == sum(sum(part.values()) - part["prompts"] for part in report.parts.values())
    assert all(len(lines(directory / name)) == rows for name, rows in report.files.items())


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    files = [STARTER / f"{kind}.jsonl" for kind in ("demonstrations", "comparisons", "rankings")]
    return prepare(files, out), out


def test_every_row_is_kept_or_rejected(starter):
    report, out = starter
    assert report.rows_in == 320 + 828 + 29
    check_counts(report, out)
    assert report.kept > 1150


def test_no_prompt_is_in_two_parts(starter):
    _, out = starter
    parts = {
        "heldout": [*out.glob("heldout_*.jsonl")],
        "judge": [*out.glob("judge_*.jsonl")],
        "reward": [out / f"{kind}.jsonl" for kind in PREFERENCES],
        "ppo": [out / "prompts.jsonl"],
    }
    prompts = {name: {opening(row) for path in paths for row in lines(path)} for name, paths in parts.items()}
    assert all(prompts.values())
    for first in prompts:
        assert not [name for name in prompts if name != first and prompts[name] & prompts[first]]
    sft = {opening(row) for row in lines(out / "demonstrations.jsonl")}
    assert not sft & prompts["heldout"]


def test_what_is_written_is_read_again_by_its_kind(starter):
    report, out = starter
    for name in report.files:
        kind = name.removesuffix(".jsonl").rpartition("_")[2]
        assert len(read_records(out / name, kind)) == report.files[name]


def test_prompts_are_different_and_those_of_ppo_and_train(starter):
    _, out = starter
    prompts = [json.dumps([(turn["role"], folded(turn["content"])) for turn in row["prompt"]]) for row in lines(out / "prompts.jsonl")]
    assert len(set(prompts)) == len(prompts) > 300
    assert {"ppo_comparisons.jsonl", "heldout_prompts.jsonl", "judge_comparisons.jsonl"} <= {path.name for path in out.iterdir()}


def test_demonstrations_are_trained_on_wherever_the_preferences_for_their_prompt_go(tmp_path):
    prompts = [f"What is the {number}th word of the book about {number * 7} seas?" for number in range(60)]
    rows = [{"prompt": prompt, "completion": f"It is {answer}."} for prompt in prompts for answer in ("sea", "a wholly different word")]
    rows += [{"prompt": prompt, "chosen": "That one there.", "rejected": "I do not read."} for prompt in prompts]
    report = prepare(rows, tmp_path / "out", near_duplicates=1, judge=0.3, ppo=0.3)
    check_counts(report, tmp_path / "out")
    assert {name for name in report.files if "demonstrations" in name} == {"demonstrations.jsonl", "heldout_demonstrations.jsonl"}
    of_ppo = [row["prompt"][0]["content"] for row in lines(tmp_path / "out" / "prompts.jsonl")]
    assert sorted(of_ppo) == sorted({row["prompt"][0]["content"] for row in lines(tmp_path / "out" / "ppo_comparisons.jsonl")})
    assert len(of_ppo) == 18


def test_rows_that_become_one_record_are_all_counted(tmp_path):
    scored = [
        {"prompt": f"Question {item}, please?", "response": f"Answer {score}", "score": score} for item in "abc" for score in (1, 5, 7, 7)
    ]
    write_records(tmp_path / "scored.jsonl", [*scored, {"prompt": "alone", "response": "x", "score": 1}])
    report = prepare([tmp_path / "scored.jsonl"], tmp_path / "out", heldout=0, judge=0, ppo=0)
    check_counts(report, tmp_path / "out")
    assert (report.rows_in, report.records, report.rejected) == (13, 3, 1)
    assert "13 rows in (3 records), 3 kept, 1 rejected" in report.summary()


def test_the_report_is_a_page_without_scripts_that_a_person_can_read(starter):
    report, out = starter
    page = (out / "data_report.html").read_text()
    tags = Counter()
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.update([tag])
    parser.feed(page)
    assert tags["table"] >= 4 and not {"script", "img", "iframe", "link"} & set(tags)
    assert "http" not in page.replace("http-equiv", "")
    data = json.loads((out / "data_report.json").read_text())
    assert data["rows_in"] == report.rows_in and data["files"] == report.files
    assert "| near-duplicates |" in (out / "data_report.md").read_text()
    assert {row["use_case"] for mix in data["use_cases"] for row in mix["rows"]} >= {"open_qa", "chat", "rewrite"}
    assert "1,177 rows in" in str(report)


def broken_files(tmp_path):
    """One of everything that a step finds, and rows that are fine."""
    about = {"annotator": "ann", "created": "2026-01-02", "age": 40, "flags": {"harmful": False}}
    things = ("war", "peace", "sea", "moon", "rye", "oak")
    good = [
        {"prompt": f"Tell me about the {it} of old, please", "completion": f"The {it} was long and {it} again.", **about} for it in things
    ]
    bad = [
        good[0],
        {**good[1], "completion": "The peace was long and peace once again."},
        {"prompt": "Where can I find her then?", "completion": "Write to jane@mail.org, or call at the house by the sea."},
        {"prompt": "Where can I find her then?", "completion": "Write to jane@mail.org, or call at the house by the lake."},
        {"prompt": "Say hi to this man", "completion": "Say hi to this man"},
        {"prompt": "Which <b>tag</b>?", "completion": "Hi<|im_end|> <script>alert(1)</script>"},
        {"prompt": "Write to me", "completion": "At jane@mail.org, or 212-736-5000"},
        {"prompt": "Short", "completion": "No"},
        {"prompt": "Long", "completion": "No " * 500},
        {"prompt": "What is in the evaluation file here?", "completion": "What must not be there, of course."},
        {"prompt": "Ende?", "completion": "Das ist ein langer deutscher Satz, der hier nicht hingehört, und noch ein zweiter dazu."},
    ]
    write_records(tmp_path / "mixed.jsonl", [*good, *bad])
    with (tmp_path / "mixed.jsonl").open("a") as file:
        file.write('{"prompt": "cut"\n{"prompt": "", "completion": "x"}\n{"prompt": "a", "completion": "half \\ud800"}\n')
    write_records(tmp_path / "evaluation.jsonl", [{"prompt": "what is in the evaluation FILE here"}])
    return [tmp_path / "mixed.jsonl"]


ALL = {"min_answer_characters": 3, "max_answer_characters": 400, "language": ("en",), "pii": "drop", "heldout": 0.2}


def test_each_step_rejects_its_own(tmp_path):
    pytest.importorskip("py3langid")
    files = broken_files(tmp_path)
    report = prepare(files, tmp_path / "out", evaluation=(str(tmp_path / "evaluation.jsonl"),), **ALL)
    check_counts(report, tmp_path / "out")
    assert {step.name: sum(step.rejected.values()) for step in report.steps if step.rejected} == {
        "read": 3, "personal data": 3, "exact duplicates": 1, "length": 2, "language": 1, "quality": 2, "evaluation leaks": 1,
        "near-duplicates": 1,
    }  # fmt: skip
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert all(row["file"] == str(files[0]) and row["line"] > 0 and row["reason"] for row in rejected)
    assert rejected[0] | {"row": None} == {
        "step": "read", "reason": rejected[0]["reason"], "file": str(files[0]), "line": 18, "row": None,
    }  # fmt: skip
    assert next(row["reason"] for row in rejected if row["step"] == "near-duplicates") == f"near-duplicate: of {files[0]}:2"
    everything = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "jane@mail.org" not in everything and "212-736" not in everything
    assert "<script>" not in (tmp_path / "out" / "data_report.html").read_text()


@pytest.mark.parametrize("pii", ["count", "mask"])
def test_personal_data_is_never_shown_in_a_report(tmp_path, pii):
    report = prepare(broken_files(tmp_path), tmp_path / "out", pii=pii, heldout=0.2)
    for ending in ("html", "md", "json"):
        assert "jane@" not in (tmp_path / "out" / f"data_report.{ending}").read_text()
    kept = "".join(path.read_text() for path in (tmp_path / "out").glob("*demonstrations.jsonl"))
    assert ("jane@mail.org" in kept, "[EMAIL]" in kept) == (pii == "count", pii == "mask")
    assert any("Personal data was found and left in" in note for note in report.notes) == (pii == "count")


def test_metadata_goes_through_every_step(tmp_path):
    prepare(broken_files(tmp_path), tmp_path / "out", pii="mask", mix={"open_qa": 1, "generation": 1}, mix_distance=1.0, heldout=0.2)
    kept = [row for name in ("", "heldout_") for row in lines(tmp_path / "out" / f"{name}demonstrations.jsonl")]
    told = [row for row in kept if row.get("annotator")]
    assert len(told) == 6
    assert all(row["created"] == "2026-01-02" and row["age"] == 40 and row["flags"] == {"harmful": False} for row in told)


def test_a_fuzzed_file_loses_no_row(tmp_path):
    rng = random.Random(0)
    source = (STARTER / "comparisons.jsonl").read_bytes().splitlines()[:150] + (STARTER / "rankings.jsonl").read_bytes().splitlines()
    for name, rows in (("comparisons", source[:150]), ("rankings", source[150:])):
        mutated = []
        for row in rows * 4:
            row = bytearray(row)
            for _ in range(rng.choice([0, 1, 3])):
                place = rng.randrange(len(row))
                row[place : place + rng.choice([0, 1, 20])] = rng.choice(
                    [b"", b'"', b"\xff", b"{", b"\\ud800", b"null", b"\x00", b"\xe2\x80\xa8"]
                )
            mutated.append(bytes(row).replace(b"\n", b" "))
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(mutated) + b"\n")
    report = prepare([tmp_path / "comparisons.jsonl", tmp_path / "rankings.jsonl"], tmp_path / "out", near_duplicates=1)
    assert report.rows_in == len([row for row in source if row.strip()]) * 4
    check_counts(report, tmp_path / "out")


def votes():
    ways = {"ann": "AAAAAA", "bob": "AAAABB", "cy": "AABBBB"}
    return [
        {"prompt": f"What is {name} of the kind {number}?", "chosen": f"{name} good", "rejected": "bad"}
        | ({} if way == "A" else {"chosen": "bad", "rejected": f"{name} good"})
        | {"annotator": who, "country": "DE" if who == "cy" else "PH"}
        for who, said in ways.items()
        for number, (name, way) in enumerate(zip(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"], said, strict=True))
    ]


def test_annotators_are_votes_and_their_agreement_is_reported(tmp_path):
    report = prepare(votes(), tmp_path / "out", group_by="country", judge=0, ppo=0, heldout=0.2)
    check_counts(report, tmp_path / "out")
    told = {row["name"]: row for row in report.annotators}
    assert {name: row["rows"] for name, row in told.items()} == {"ann": 6, "bob": 6, "cy": 6}
    assert told["bob"]["agreement"] == pytest.approx((2 * 1 + 2 * 0.5 + 2 * 0.5) / 6)
    assert {row["name"]: row["rows"] for row in report.groups} == {"PH": 12, "DE": 6}
    assert report.contested == 4
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert {row["reason"] for row in rejected} == {"contradicts another preference"}
    assert len(rejected) == 4  # two pairs lose cy's vote, two ann's
    both = prepare(votes(), tmp_path / "both", contradictions="count", judge=0, ppo=0, heldout=0.2)
    assert both.kept == 18 and both.contested == 4


def test_sampling_towards_a_mix_counts_what_it_leaves_out(tmp_path):
    report = prepare([STARTER / "demonstrations.jsonl"], tmp_path / "out", mix={"open_qa": 0.5, "brainstorming": 0.5}, mix_distance=0.05)
    check_counts(report, tmp_path / "out")
    mix = report.mixes[0]
    assert mix["distance_after"] <= 0.06 < mix["distance"]
    assert report.steps[-1].name == "use-case mix" and report.steps[-1].kept == sum(row["kept"] for row in mix["rows"])


def test_the_same_rows_in_another_order_are_split_alike(tmp_path):
    rows = lines(STARTER / "comparisons.jsonl")[:200]
    write_records(tmp_path / "a.jsonl", rows)
    write_records(tmp_path / "b.jsonl", rows[::-1])
    held = []
    for name in "ab":
        prepare([tmp_path / f"{name}.jsonl"], tmp_path / name)
        held.append({opening(row) for row in lines(tmp_path / name / "heldout_comparisons.jsonl")})
    assert held[0] == held[1]


def test_tokens_are_counted_with_the_models_template(tmp_path, tiny_path):
    from instructlite.models.base import encode_prompt, load_tokenizer

    rows = [{"prompt": "a" * 10, "completion": "b" * 5}, {"prompt": "a" * 60, "completion": "b" * 5}]
    report = prepare(rows, tmp_path / "out", tokenizer=str(tiny_path), chat_template="chatml", max_length=40, heldout=0)
    tokens = report.tokens["demonstrations"].to_dict()
    prompt = len(encode_prompt(load_tokenizer(str(tiny_path), "chatml"), "a" * 10))
    assert min(report.tokens["demonstrations"].total) == prompt + 5 + 1
    assert (tokens["cut"], tokens["no_room_for_an_answer"]) == (1, 1)
    assert any("longer than 40 tokens" in note for note in report.notes)


def test_a_second_run_replaces_its_own_files_and_nobody_elses(tmp_path):
    out = tmp_path / "out"
    files = broken_files(tmp_path)
    prepare(files, out)
    prepare(files, out, kind="demonstrations", heldout=0)
    assert not (out / "heldout_demonstrations.jsonl").exists()
    assert not list(out.glob(".prepare-*"))
    (out / "mine.jsonl").write_text("{}\n")
    with pytest.raises(InstructLiteError, match="mine.jsonl there was not written by"):
        prepare(files, out)
    with pytest.raises(InstructLiteError, match="lies in the output directory"):
        prepare(files, tmp_path)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"pii": "hide"}, "pii=hide: choose count, mask, drop, off"),
        ({"heldout": 1.5}, "heldout=1.5: expected a share"),
        ({"heldout": 0.5, "judge": 0.5}, "nothing would be left for the reward model"),
        ({"near_duplicates": 0.2}, "expected 0.5 to 1"),
        ({"kind": "demos"}, "kind=demos: choose demonstrations"),
        ({"min_answer_characters": 10_000}, "no row is left: length: answer too short 6"),
        ({"evaluation": ("no/such.jsonl",)}, "no/such.jsonl: "),
        ({"pii_backend": "json:no_such"}, "pii_backend=json:no_such: no such function"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, options, said):
    rows = [{"prompt": f"question {number}", "completion": "answer"} for number in range(6)]
    with pytest.raises(InstructLiteError, match=said):
        prepare(rows, tmp_path / "out", near_duplicates=options.pop("near_duplicates", 1), **options)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_missing_file_is_said_before_anything_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["data", "prepare", str(STARTER / "comparisons.jsonl"), str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "no.jsonl: cannot be read" in capsys.readouterr().err


def test_the_command_takes_every_option_and_says_where_to_look(tmp_path):
    arguments = ["data", "prepare", *map(str, broken_files(tmp_path)), "--out", str(tmp_path / "out"), "--quality", "refusal=drop"]
    told = CliRunner().invoke(app, [*arguments, "--min-answer", "3", "--pii", "mask", "--heldout", "0.2", "--near-duplicates", "0.8"])
    assert told.exit_code == 0, told.output
    assert "20 rows in" in told.output and "data_report.html" in told.output
    assert set(PREPARE_OPTIONS) <= set(PrepareOptions.__dataclass_fields__)


def test_preparing_loads_no_torch(tmp_path):
    code = (
        "import sys\nfrom instructlite.data.preparing.prepare import prepare\n"
        f"prepare([{str(STARTER / 'rankings.jsonl')!r}], {str(tmp_path / 'out')!r})\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'sklearn'} & set(sys.modules), 'loaded torch'"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
