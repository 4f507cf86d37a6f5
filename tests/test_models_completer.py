"""Models in memory as completers, and the whole of data generation and judging against a real server (slow)."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from test_compare import make_adapter

from instructlite.config import BaseOptions
from instructlite.data.generating.completer import Completions, Endpoint, Request
from instructlite.data.generating.pairwise import Pair
from instructlite.data.generating.synthetic import generate
from instructlite.data.records import read_records, write_records
from instructlite.errors import InstructLiteError
from instructlite.evaluation.judges import Answered, LanguageModelJudge, preference
from instructlite.models.base import load_base
from instructlite.models.completer import LocalCompleter, load_scorer
from instructlite.models.roles import RoleModel
from instructlite.models.sampling import Sampling, score
from instructlite.models.sampling import generate as draw

TINY = BaseOptions(dtype="float32", chat_template="chatml")
TEXTS = ("Hi", "Why is the sky blue?", "Name a tree.")


@pytest.fixture(scope="module")
def adapters(tiny_path, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    return make_adapter(base, directory / "sft", 1), make_adapter(base, directory / "reward", 3, reward=True)


def requests(*texts: str, **options) -> list[Request]:
    return [Request([{"role": "user", "content": text}], **({"max_tokens": 8} | options)) for text in texts]


def test_a_base_and_an_adapter_answer_as_generate_does(tiny_path, adapters):
    sft, _ = adapters
    for completer, role in ((LocalCompleter.load(tiny_path, TINY), None), (LocalCompleter.load(sft.path), "policy")):
        base = completer.roles.base
        prompts = [base.encode_prompt(text) for text in TEXTS]
        wanted = draw(completer.roles, prompts, role, Sampling(8, 0.0))
        answers = completer.complete(requests(*TEXTS))
        assert [answer.text for answer in answers] == [base.decode(ids).strip() or None for ids in wanted]
        assert [(a.prompt_tokens, a.completion_tokens) for a in answers] == [(len(p), len(i)) for p, i in zip(prompts, wanted, strict=True)]
        assert [answer.truncated for answer in answers] == [ids[-1] not in base.stop_ids for ids in wanted]


def test_other_weights_are_another_identity_and_equal_ones_the_same(tiny_path, adapters):
    sft, _ = adapters
    base, adapter, again = (LocalCompleter.load(*arguments) for arguments in ((tiny_path, TINY), (sft.path,), (sft.path,)))
    assert base.identity != adapter.identity == again.identity
    assert (base.model, adapter.model) == (base.roles.base.id, "sft")


def test_equal_batches_are_answered_alike_and_seeds_tell_draws_apart(tiny_path):
    completer = LocalCompleter.load(tiny_path, TINY)
    first, again = (completer.complete(requests("Hi", temperature=1.0)) for _ in range(2))
    assert first == again
    other = completer.complete(requests("Hi", temperature=1.0, seed=1))
    assert other != first


def test_prompts_that_do_not_fit_are_missing_and_the_others_answered(tiny_path):
    completer = LocalCompleter.load(tiny_path, TINY)
    long, short = completer.complete([*requests("x" * 600), *requests("Hi", max_tokens=4)])
    assert (long.text, long.requests) == (None, 0)
    assert "exceed the model's context of 512 tokens" in long.fault
    assert short.completion_tokens <= 4


def test_answers_of_a_model_in_memory_are_kept_batch_by_batch(tiny_path, tmp_path, monkeypatch):
    completer = LocalCompleter.load(tiny_path, TINY, batch_size=2)
    whole, calls = completer.complete, []
    monkeypatch.setattr(completer, "complete", lambda batch: calls.append(len(batch)) or (whole(batch) if len(calls) < 3 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        Completions(completer, tmp_path / "cache").ask(requests(*"abcdef"))
    monkeypatch.setattr(completer, "complete", lambda batch: calls.append(len(batch)) or whole(batch))
    resumed = Completions(completer, tmp_path / "cache")
    resumed.ask(requests(*"abcdef"))
    assert resumed.usage.kept >= 3  # an answer may be empty, then it is asked again
    assert calls[:3] == [2, 2, 2]


def test_a_reward_adapter_scores_texts_on_the_completers_base_or_its_own(tiny_path, adapters):
    sft, reward = adapters
    pairs = [([{"role": "user", "content": text}], "An answer.") for text in TEXTS]
    alone = load_scorer(reward)(pairs)
    completer = LocalCompleter.load(sft.path, reward=reward.path)
    assert load_scorer(reward.path, completer)(pairs) == pytest.approx(alone, abs=1e-5)
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    sequences = [(base.encode_prompt(text), base.encode_completion("An answer.")) for text in TEXTS]
    assert score(RoleModel.load(base, {"reward": reward}), ["reward"], sequences)[0].tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 3


def test_the_wrong_adapter_is_one_line(adapters):
    sft, reward = adapters
    with pytest.raises(InstructLiteError, match="a reward adapter cannot answer"):
        LocalCompleter.load(reward.path)
    with pytest.raises(InstructLiteError, match="a policy adapter gives no scores"):
        load_scorer(sft.path)


def test_rejection_sampling_by_a_model_and_a_reward_in_memory(adapters, tmp_path):
    sft, reward = adapters
    write_records(tmp_path / "prompts.jsonl", [{"prompt": text} for text in TEXTS])
    completer = LocalCompleter.load(sft.path, reward=reward.path)
    result = generate(
        "rejection-sampling",
        tmp_path / "prompts.jsonl",
        completer,
        tmp_path / "out",
        n=3,
        score=load_scorer(reward, completer),
        max_tokens=8,
    )
    assert result.usage.requests == 9
    assert len(result.rows) + sum(row["reason"] == "no answer of any draw" for row in result.rejected) == 3


# --- a real server -----------------------------------------------------------------------------------------------------------


@contextmanager
def served(model: Path, tmp_path: Path):
    """`transformers serve` on loopback; its address."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).parent / "transformers")
    command = [program, "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            for _ in range(1200):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                    break
                time.sleep(0.25)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def kept(cache: Path) -> int:
    if not cache.is_file():
        return 0
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(cache, timeout=10)) as database:
        return database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    return 0


@pytest.mark.slow
def test_the_methods_and_a_judge_against_transformers_serve_and_the_same_model_in_memory(tmp_path):
    model = load_base("smollm2-135m", chat_template="chatml").path
    prompts = tmp_path / "prompts.jsonl"
    write_records(prompts, [{"prompt": text} for text in ("Name three rivers of Europe.", "What is rain?", "Say hello in French.")])
    small = {"max_tokens": 40, "temperature": 0.7}
    with served(model, tmp_path) as url:
        # 1. Killed half-way on the command line, and again: what was answered is not asked again.
        output = tmp_path / "killed"
        command = [
            sys.executable, "-m", "instructlite", "data", "generate", "constitutional", str(prompts), "--model", str(model),
            "--base-url", url, "--out", str(output), "--max-tokens", "40", "--parallel", "1",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while kept(output / "answers.sqlite") < 4 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = kept(output / "answers.sqlite")
        resumed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said = re.search(r"(\d+) asked, (\d+) kept from before", resumed.stdout)
        assert (int(said[2]), int(said[1])) == (before, kept(output / "answers.sqlite") - before)
        assert before >= 4
        # 2. Every method, from the server and from memory.
        completers = {"server": Endpoint(str(model), url, parallel=2), "memory": LocalCompleter.load("smollm2-135m", TINY)}
        for name, completer in completers.items():
            for method, options in (
                ("self-instruct", {"count": 2}), ("evol-instruct", {"rounds": 1}), ("constitutional", {}), ("ai-preferences", {}),
                ("rejection-sampling", {"n": 2, "score": lambda pairs: [len(answer) for _, answer in pairs]}),
            ):  # fmt: skip
                result = generate(method, prompts, completer, tmp_path / name / method, **small, **options)
                assert result.usage.asked > 0 and result.usage.tokens > 0, (name, method)
                assert not result.usage.missing, (name, method, result.usage.faults)
                if result.rows:
                    assert len(read_records(tmp_path / name / method / f"{result.kind}.jsonl", result.kind)) == len(result.rows)
        # 3. A judge.
        arbiter = LanguageModelJudge.of(Completions(completers["server"]), max_tokens=40)
        pairs = [Pair([{"role": "user", "content": "What is 1+1?"}], "It is 2.", "I like trains.")]
        assert preference(pairs, arbiter.compare(pairs))["pairs"] == 1
        assert len(arbiter.rate([Answered(pairs[0].prompt, "It is 2.")], "likert")) == 1
