"""Pushing to, and reading from, a Hub on 127.0.0.1: what goes out and what never does, and what happens when it goes wrong."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub
import loopback_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from loopback_hub import CUT, TOKEN, serve
from peft import PeftModel
from test_compare import DEMONSTRATIONS, FAST, PROMPTS, make_adapter
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from instructlite import SFTRecipe, evaluate, push_to_hub
from instructlite.cli import app, main
from instructlite.errors import InstructLiteError
from instructlite.evaluation.candidates import candidates_of
from instructlite.evaluation.report import Report
from instructlite.evaluation.runs import policies
from instructlite.models.base import load_base
from instructlite.models.engine import Engine
from instructlite.models.manifest import Adapter, adapters_in, is_adapter
from instructlite.sharing import contents, hub
from instructlite.sharing.card import model_card
from instructlite.sharing.hub import HubError

BASE = "me/tiny-base"
FOLDERS = ["sft", "dpo", "ppo-ptx", "ppo", "reward", "judge"]


@pytest.fixture(scope="module")
def finished(tiny_path, tmp_path_factory):
    """A run as `instructlite run` leaves it, with what must not go out beside what may."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    sft = make_adapter(base, run / "sft", 1)
    reward = make_adapter(base, run / "reward", 3, reward=True, parents={"sft": sft.sha256})
    make_adapter(base, run / "judge", 4, reward=True, parents={"sft": sft.sha256})
    make_adapter(base, run / "ppo", 2, parents={"sft": sft.sha256, "reward": reward.sha256})
    make_adapter(base, run / "ppo-ptx", 6, parents={"sft": sft.sha256, "reward": reward.sha256})
    make_adapter(base, run / "dpo", 5, parents={"sft": sft.sha256})
    for stage in FOLDERS:
        config = {"model": str(run / "sft"), "data": str(run / "data" / "x.jsonl"), "revision": None, "lora": {"r": 4}}
        record = {
            "recipe": stage.replace("judge", "reward").partition("-")[0],
            "config": config,
            "versions": {"torch": "2"},
            "metrics": {"health": {}},
        }
        record["data"] = {"prompts": {"rows": 5, "sha256": "ab" * 32}}
        (run / stage / "run.json").write_text(json.dumps(record))
    (run / "recipe.yaml").write_text(
        yaml.safe_dump({"model": str(tiny_path), "data": {"demonstrations": ["org/talk:train", "/home/x/d.jsonl"]}})
    )
    evaluate(["base", run / "sft", run / "ppo"], PROMPTS, [run / "judge", run / "reward"], heldout_demonstrations=DEMONSTRATIONS,
             output_dir=run / "report", **FAST)  # fmt: skip
    for unwanted in ("ppo/training_args.bin", "ppo/optimizer.pt", "data/x.jsonl", "votes.sqlite", "ppo/metrics.jsonl", ".env"):
        (run / unwanted).parent.mkdir(exist_ok=True)
        (run / unwanted).write_text('{"step": 1}')
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "mine")


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The loopback Hub in place of the real one, with an empty cache and a token in the environment."""
    server = serve()
    values = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "first_wait", 0.01)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", type("NoWaiting", (), {"sleep": lambda seconds: None, "time": lambda: 0.0}))
    yield server
    huggingface_hub.utils._http.close_session()
    server.shutdown()
    server.server_close()


def push(run, **options):
    return push_to_hub(run, "me/mine", **{"base_model": BASE} | options)


def commits(server):
    return [line for line in server.log if "/commit/" in line]


# --- what goes out ------------------------------------------------------------------------------------------------------------


def test_a_run_becomes_one_repository_in_one_commit(run, online):
    done = push(run)
    repo = online.repos["me/mine"]
    assert repo.private and len(commits(online)) == 1 and done.changed and done.commit == repo.sha
    files = repo.files("main")
    assert {name.split("/")[0] for name in files if "/" in name} == {*FOLDERS, "report"}
    assert (
        files["adapter_model.safetensors"] == files["ppo/adapter_model.safetensors"] == (run / "ppo/adapter_model.safetensors").read_bytes()
    )
    allowed = {"README.md", "recipe.yaml", "report/report.json", "report/report.md", "report/report.html"}
    each = {"adapter_model.safetensors", "adapter_config.json", "instructlite.json", "run.json", "tokenizer.json", "tokenizer_config.json"}
    allowed |= {f"{folder}{name}" for folder in ("", *(f"{one}/" for one in FOLDERS)) for name in (*each, "chat_template.jinja")}
    assert set(files) == allowed
    assert done.sizes == {name: len(data) for name, data in files.items()}


def test_nothing_of_this_machine_is_in_what_goes_out(run, online, tiny_path):
    push(run)
    for name, data in online.repos["me/mine"].files("main").items():
        for path in (run, tiny_path, run.parent):
            assert str(path).encode() not in data, name
    config = json.loads(online.repos["me/mine"].files("main")["sft/adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE
    assert json.loads(online.repos["me/mine"].files("main")["ppo/run.json"])["config"]["model"] == "sft"


def test_a_base_that_is_a_directory_here_needs_a_public_name(run):
    with pytest.raises(InstructLiteError, match=r"its base is a directory here .*--base-model"):
        push_to_hub(run, "me/mine", dry_run=True)


@pytest.mark.parametrize(
    "file", ["ppo/run.json", "sft/tokenizer_config.json", "report/report.md", "recipe.yaml", "reward/adapter_model.safetensors"]
)
@pytest.mark.parametrize("secret", ["hf_" + "A1b2C3d4" * 4, "AKIA" + "A1B2C3D4E5F6G7H8", "-----BEGIN RSA PRIVATE KEY-----"])
def test_a_planted_secret_stops_the_push_and_is_not_shown(run, file, secret, online):
    path = run / file
    before = path.read_bytes()
    planted = before.rstrip()[:-1] + f', "note": "{secret}"}}'.encode() if path.suffix == ".json" else before + f"\n# {secret}\n".encode()
    path.write_bytes(planted)
    manifest = path.with_name("instructlite.json")
    if manifest.is_file():  # as if it had been written so: a file that was changed later is refused for that
        manifest.write_text(manifest.read_text().replace(hashlib.sha256(before).hexdigest(), hashlib.sha256(planted).hexdigest()))
    if file == "recipe.yaml":
        path.write_text(before.decode() + f"note: {secret!r}\n")
    with pytest.raises(InstructLiteError, match=re.escape(file)) as stopped:
        push(run)
    assert secret not in str(stopped.value) and not online.log


def test_the_values_of_your_own_secrets_stop_the_push_whatever_they_look_like(run, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    (run / "report" / "report.md").write_text("I said: correct horse battery.")
    with pytest.raises(InstructLiteError, match=r"report/report\.md: the value of the environment variable MY_API_KEY"):
        push(run, dry_run=True)


def test_a_secret_across_the_edge_of_two_blocks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_BLOCK", 4096)
    file = tmp_path / "weights"
    file.write_bytes(b"." * 4080 + TOKEN.encode() + b"." * 9000)
    with pytest.raises(InstructLiteError, match="what looks like a Hugging Face token"):
        contents.scan({"adapter_model.safetensors": file}, tmp_path)


def test_a_path_of_this_machine_in_a_text_stops_the_push(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "people" / "ann"))
    (run / "report" / "report.md").write_text(f"See {tmp_path}/people/ann/secret plans.")
    with pytest.raises(InstructLiteError, match=r"report\.md: a path of this machine \(your home directory\)"):
        push(run, dry_run=True)


def test_a_damaged_adapter_is_not_pushed(run):
    with (run / "sft" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(InstructLiteError, match="changed since training"):
        push(run, dry_run=True)


def test_a_dry_run_needs_no_network_and_lists_what_would_go(run):
    planned = push(run, dry_run=True)
    assert planned.commit is None
    assert re.search(r"me/mine \(private\): \d+ files", str(planned)) and "ppo/adapter_model.safetensors" in str(planned)


def test_one_adapter_is_a_repository_of_its_own(run, online):
    push_to_hub(run / "reward", "me/judge", base_model=BASE, report=run / "report")
    files = online.repos["me/judge"].files("main")
    assert not any(name.startswith(("sft/", "reward/")) for name in files)
    assert ModelCard(files["README.md"].decode()).data.pipeline_tag == "text-classification"


# --- the card -----------------------------------------------------------------------------------------------------------------


def numbers_in(value):
    if isinstance(value, dict):
        return [n for key, item in value.items() for n in numbers_in(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_every_number_of_the_evaluation_is_in_the_report(run):
    card = push(run, dry_run=True).card
    section = card.split("## Did it work?")[1].split("\n## ")[0]
    shown = [found.lstrip("+") for found in re.findall(r"(?<![\w.-])[-+]?\d+(?:\.\d+)?", section.replace("95 %", "").replace("0.5 ", " "))]
    known = numbers_in(json.loads((run / "report" / "report.json").read_text()))
    assert len(shown) > 40
    for number in shown:
        digits = len(number.partition(".")[2])
        assert any(f"{value:.{digits}f}" == number for value in known) or number in ("0.5", "0.5."), number


def test_the_card_has_the_metadata_that_the_hub_reads(run):
    card = ModelCard(push(run, dry_run=True, license="apache-2.0").card)
    assert (card.data.base_model, card.data.library_name, card.data.license) == (BASE, "peft", "apache-2.0")
    assert card.data.datasets == ["org/talk"]
    report = Report.load(run / "report")
    rates = {f"{r['judge']}, {r['decoding']}": round(r["rate"], 3) for r in report.win_rates if (r["a"], r["b"]) == ("ppo", "sft")}
    assert {result.metric_name.partition(" by ")[2]: result.metric_value for result in card.data.eval_results} == rates
    for sha256 in (Adapter.load(run / stage).sha256[:12] for stage in ("sft", "reward", "ppo", "judge")):
        assert sha256 in card.text
    assert "prompts: 5, abababababab" in card.text


def test_without_a_report_or_with_that_of_another_adapter_the_card_says_not_evaluated(run, tiny_path):
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    shutil.rmtree(run / "ppo")
    make_adapter(base, run / "ppo", 7)
    planned = push(run, dry_run=True)
    assert "Not evaluated." in planned.card and "eval_results" not in planned.card and "model-index" not in planned.card
    assert not any(name.startswith("report/") for name in planned.sizes) and "not about this adapter" in planned.notes[0]
    with pytest.raises(InstructLiteError, match="not about this adapter"):
        push(run, dry_run=True, report=run / "report")
    shutil.rmtree(run / "report")
    assert "Not evaluated." in push(run, dry_run=True).card


# --- repeated, refused, cut off --------------------------------------------------------------------------------------------------


def test_pushing_again_sends_nothing_and_makes_no_commit(run, online):
    first = push(run)
    online.log.clear()
    second = push(run)
    assert not second.changed and second.commit == first.commit
    assert not commits(online) and not any(line.startswith("PUT") for line in online.log)


def test_the_stages_are_in_one_collection_once_each(run, online):
    for stage in ("sft", "ppo", "ppo"):
        pushed = push_to_hub(run / stage, f"me/tiny-{stage}", base_model=BASE, collection="My loop")
    (slug, collection), *others = online.collections.items()
    assert not others
    assert (collection["title"], collection["private"]) == ("My loop", True)
    assert [item["id"] for item in collection["items"]] == ["me/tiny-sft", "me/tiny-ppo"]
    assert [item["note"]["text"].partition(",")[0] for item in collection["items"]] == ["sft", "ppo"]
    assert pushed.collection.endswith(slug)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "--max-lora-rank 8 --lora-modules x=me/x --chat-template"),
        ({"r": 600}, "does not serve"),
        ({"use_dora": True}, "does not serve"),
    ],
)
def test_the_card_has_the_line_that_serves_it_where_vllm_can(run, changes, expected):
    gathered = contents.gather(run / "ppo", BASE)
    config = gathered.json("adapter_config.json") | changes
    gathered.files["adapter_config.json"] = json.dumps(config).encode()
    assert expected in model_card(gathered, "me/x", None, None)


def test_what_a_new_push_lacks_is_deleted_and_what_others_put_there_is_not(run, online):
    push(run)
    online.repos["me/mine"].commits[-1]["notes/mine.txt"] = b"kept"
    shutil.rmtree(run / "report")
    shutil.rmtree(run / "judge")
    shutil.rmtree(run / "ppo-ptx")
    push(run)
    files = online.repos["me/mine"].files("main")
    assert files["notes/mine.txt"] == b"kept" and not any(name.startswith(("report/", "judge/", "ppo-ptx/")) for name in files)


def test_the_card_names_every_adapter_and_which_stands_at_the_root(run):
    shown = push(run, dry_run=True).card
    table = shown.partition("## What is here")[2].partition("##")[0]
    assert re.findall(r"^\| \[([\w-]+)/\]", table, re.MULTILINE) == FOLDERS and "| the root | the policy, the same as `ppo/` |" in table
    shutil.rmtree(run / "ppo")
    assert "the policy, the same as `ppo-ptx/`" in push(run, dry_run=True).card


@pytest.mark.parametrize("part", ["repos/create", "preupload", "objects/batch", "/lfs/", "/commit/"])
@pytest.mark.parametrize("failures", [(429, 503), (CUT, 500)])
def test_what_passes_is_tried_again(run, online, part, failures):
    online.fail(part, *failures, Retry_After="0")
    assert push(run).changed
    assert len(online.repos["me/mine"].commits) == 2  # the empty one, and ours


def test_a_commit_that_arrived_though_its_answer_was_lost_is_not_made_twice(run, online, monkeypatch):
    answer, lost = loopback_hub.Handler.answer, []

    def answer_but_once(self, status, content=b"", **headers):
        if "commitOid" in content and not lost:
            lost.append(content)
            self.close_connection = True
            self.connection.close()
        else:
            answer(self, status, content, **headers)

    monkeypatch.setattr(loopback_hub.Handler, "answer", answer_but_once)
    push(run)
    assert lost and len(online.repos["me/mine"].commits) == 2


def test_a_commit_of_somebody_else_in_between_is_no_end(run, online):
    online.fail("/commit/", 409, 412)
    assert push(run).changed


@pytest.mark.parametrize(
    ("part", "status", "words"),
    [
        ("repos/create", 401, r"does not accept the token in HF_TOKEN \(401\)"),
        ("preupload", 403, r"may not write there \(403\)"),
        ("/commit/", 403, r"may not write there \(403\)"),
    ],
)
def test_a_refusal_says_which_token_and_never_its_value(run, online, part, status, words):
    online.fail(part, status, status)
    if part == "repos/create":
        online.fail("api/models", status)
    before = sorted(path for path in run.rglob("*"))
    with pytest.raises(HubError, match=words) as refused:
        push(run)
    assert TOKEN not in str(refused.value) and sorted(run.rglob("*")) == before
    assert len(online.repos.get("me/mine", loopback_hub.Repo(True)).commits) == 1


def test_after_several_tries_it_says_how_to_go_on(run, online):
    online.fail("/commit/", *[503] * 9)
    with pytest.raises(HubError, match=r"answers 503 .*repeat the same command"):
        push(run)
    assert len(commits(online)) == hub.TRIES
    online.failures.clear()
    online.log.clear()
    push(run)
    assert not any(line.startswith("PUT") for line in online.log), "weights that had arrived were sent again"


def test_a_public_repository_is_not_pushed_to_by_default(run, online):
    push(run, private=False)
    assert not online.repos["me/mine"].private
    with pytest.raises(HubError, match=r"exists and is public.*--public"):
        push(run)


def test_without_a_login_nothing_is_asked_of_the_hub(run, online, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="not logged in"):
        push(run)
    assert not online.log


def test_offline_it_says_so(run, online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(run)


@pytest.mark.parametrize("name", ["mine", "me/my name", "me/a/b"])
def test_a_name_that_is_none_is_refused(run, name):
    with pytest.raises(InstructLiteError):
        push_to_hub(run, name, base_model=BASE, dry_run=True)


def test_a_directory_without_adapters_is_refused(tmp_path):
    with pytest.raises(InstructLiteError, match="neither a run nor an adapter"):
        push_to_hub(tmp_path, "me/mine")


# --- the command ---------------------------------------------------------------------------------------------------------------


def test_the_command_lists_and_pushes(run, online):
    arguments = ["push", str(run), "me/mine", "--base-model", BASE]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0 and "Nothing was sent" in planned.output and "library_name: peft" in planned.output and not online.log
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and f"Pushed: {online.url}/me/mine" in done.output
    assert "Nothing had changed" in CliRunner().invoke(app, arguments).output


def test_a_refusal_by_the_hub_is_exit_code_3(run, online, capsys):
    online.fail("preupload", *[403] * 2)
    with pytest.raises(SystemExit) as end:
        main(["push", str(run), "me/mine", "--base-model", BASE])
    assert end.value.code == 3 and "(403)" in capsys.readouterr().err


# --- read back -----------------------------------------------------------------------------------------------------------------


def with_base(server, tiny_path):
    """Put the base itself on the loopback Hub."""
    repo = server.repos[BASE] = loopback_hub.Repo(private=False)
    repo.commits.append({path.name: path.read_bytes() for path in tiny_path.iterdir()})


def test_a_repository_is_a_model_a_candidate_and_a_judge(run, online, tiny_path, tmp_path):
    with_base(online, tiny_path)
    push(run)
    assert is_adapter("me/mine/sft") and is_adapter("me/mine") and not is_adapter(BASE) and not is_adapter("me/nothing")
    adapter = Adapter.load("me/mine/ppo")
    assert (adapter.name, str(adapter), adapter.sha256) == ("ppo", "me/mine/ppo", Adapter.load(run / "ppo").sha256)
    here = Report.load(run / "report")
    assert [candidate.name for candidate in candidates_of(["base", "me/mine/sft", "me/mine"])] == ["base", "sft", "mine"]
    report = evaluate(["base", "me/mine/sft", "me/mine"], PROMPTS, "me/mine/judge", **FAST)
    assert [row["mean_reward"] for row in report.candidates] == [row["mean_reward"] for row in here.candidates]
    training = {"max_steps": 1, "per_device_train_batch_size": 1}
    again = SFTRecipe(model="me/mine/sft", data=DEMONSTRATIONS, training=training).run(tmp_path / "again")
    assert again.manifest.parents == {"sft": adapter.load(run / "sft").sha256}
    assert again.manifest.base == BASE and again.manifest.revision == online.repos[BASE].sha  # the commit that it was trained on


def test_the_adapters_of_a_run_are_found_by_everybody_in_one_order_here_and_on_the_hub(run, online, tiny_path, tmp_path):
    with_base(online, tiny_path)
    push(run)
    assert list(adapters_in(run)) == list(adapters_in("me/mine")) == FOLDERS
    assert policies(run) == FOLDERS[:4]
    assert {name: one.sha256 for name, one in adapters_in("me/mine").items()} == {
        name: one.sha256 for name, one in adapters_in(run).items()
    }
    for source in (run, "me/mine"):  # as `app` and `serve` do
        with Engine.load(source) as engine:
            assert [pane.name for pane in engine.panes] == ["base", "sft", "dpo", "ppo-ptx", "ppo"]
    push_to_hub(run / "sft", "me/one", base_model=BASE)
    assert adapters_in("me/one") == adapters_in("me/nothing") == adapters_in("me/mine/sft") == adapters_in(tmp_path) == {}
    with Engine.load("me/one") as engine:
        assert [pane.name for pane in engine.panes] == ["base", "one"]


def test_what_was_downloaded_works_without_the_hub(run, online, monkeypatch):
    push(run)
    Adapter.load("me/mine")
    assert list(adapters_in("me/mine")) == FOLDERS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Adapter.load("me/mine").sha256 == Adapter.load(run / "ppo").sha256
    assert list(adapters_in("me/mine")) == FOLDERS


def test_a_revision_can_be_named(run, online):
    first = push(run)
    shutil.rmtree(run / "ppo")
    push(run)
    assert Adapter.load(f"me/mine@{first.commit}").sha256 != Adapter.load("me/mine").sha256


def test_a_manifest_that_lists_something_else_than_an_adapters_files_is_refused(run, online):
    push(run)
    manifest = json.loads(online.repos["me/mine"].commits[-1]["instructlite.json"])
    manifest["files"]["../evil.pt"] = "00"
    online.repos["me/mine"].commits[-1]["instructlite.json"] = json.dumps(manifest).encode()
    with pytest.raises(InstructLiteError, match="no file of an adapter"):
        Adapter.load("me/mine")


def test_a_missing_repository_is_one_line(online):
    with pytest.raises(InstructLiteError, match="me/nothing: neither a directory here nor an InstructLite adapter on the Hub"):
        Adapter.load("me/nothing")


PLAIN = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "instructlite" not in sys.modules
ids = torch.arange(4, 24)[None]
models = [AutoPeftModelForCausalLM.from_pretrained("me/mine"),
          PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/tiny-base"), "me/mine", subfolder="sft"),
          AutoModelForCausalLM.from_pretrained("me/mine")]
assert AutoTokenizer.from_pretrained("me/mine").chat_template
torch.save([model.eval()(ids).logits.detach() for model in models], sys.argv[1])
"""


def test_the_card_shows_how_the_adapters_are_read_here(run):
    card = push(run, dry_run=True).card
    for line in ('AutoPeftModelForCausalLM.from_pretrained("me/mine")', 'from_pretrained("me/tiny-base"), "me/mine", subfolder="sft")'):
        assert line in card and line in PLAIN


def test_plain_peft_and_transformers_read_the_same_logits_from_the_hub(run, online, tiny_path, tmp_path):
    with_base(online, tiny_path)
    push(run)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": online.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "logits"], env=environment, check=True, cwd=tmp_path)
    ids = torch.arange(4, 24)[None]
    here = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), run / stage) for stage in ("ppo", "sft")]
    ppo, sft = (model.eval()(ids).logits.detach() for model in here)
    for read, expected in zip(torch.load(tmp_path / "logits"), (ppo, sft, ppo), strict=True):
        assert torch.equal(read, expected)
