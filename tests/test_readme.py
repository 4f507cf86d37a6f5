"""What README and docs show works: Python blocks run on the tiny model, commands exist, links lead somewhere, the tree is the tree."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from instructlite.cli import app
from instructlite.data.records import write_records

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md", ROOT / "CONTRIBUTING.md"]
README = PAGES[0].read_text(encoding="utf-8")
WORDS = ("yes", "no", "maybe", "so", "well", "oh", "ah", "eh")


def blocks(language: str) -> list[str]:
    return [block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def tiny(code: str, base: Path) -> str:
    """The block with the tiny base in place of the real one, and two optimiser steps instead of two hundred."""
    small = '"per_device_train_batch_size": 2, "max_steps": 2'
    code = code.replace('"Qwen/Qwen3-0.6B"', repr(str(base))).replace('quantization="nf4"', 'dtype="float32", chat_template="chatml"')
    code = code.replace('{"max_steps": 200}', f'{{{small}, "response_length": 4}}')
    code = code.replace(
        "max_steps=64)", "max_steps=16, response_length=4, use_cpu=True, report_to=[], save_strategy='no', disable_tqdm=True)"
    )
    return re.sub(r'(Recipe\(model=[^\n]*?data="\w+\.jsonl")(?![^\n]*training=)', rf"\1, training={{{small}}}", code)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    here = tmp_path_factory.mktemp("readme")
    rows = [{"prompt": f"say {word}", "completion": f"{word}!"} for word in WORDS]
    compared = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "?"} for row in rows]
    write_records(here / "demonstrations.jsonl", rows)
    for name in ("comparisons", "more_comparisons", "heldout"):
        write_records(here / f"{name}.jsonl", compared)
    write_records(here / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    return here


def test_the_python_blocks_run_one_after_the_other(workplace, tiny_path, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for block in blocks("python"):
        exec(compile(tiny(block, tiny_path), "a page", "exec"), {})
    assert "win rate" in capsys.readouterr().out
    assert (workplace / "runs" / "report" / "report.json").is_file()


def test_the_commands_exist_with_their_options():
    commands = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    ours = [shlex.split(command)[1:] for command in commands if command.startswith("instructlite ")]
    assert len(ours) >= 5
    for words in ours:
        verbs = words[:2] if words[0] in ("data", "votes") else words[:1]
        shown = CliRunner().invoke(app, [*verbs, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, words
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{' '.join(verbs)} has no {option}"


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", "\n".join(blocks("bash")), re.MULTILINE)) <= targets


def test_every_module_stands_in_the_tree():
    modules = {path.name for path in (ROOT / "instructlite").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")}
    assert not [name for name in modules if name not in README]
