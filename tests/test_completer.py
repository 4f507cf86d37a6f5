"""Who answers is asked once, within a budget; what does not come, or comes broken, is missing and nothing else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from endpoints import FakeCompleter, Reply, stand_in

from instructlite.data.generating import completer as module
from instructlite.data.generating.completer import Answer, Budget, Completions, Endpoint, Pace, Request
from instructlite.errors import InstructLiteError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Between repetitions. The client's own waits are as short as the stand-in's headers say."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


def asked_of(server, texts, cache=None, budget=None, give_up_after=20, **options):
    completions = Completions(Endpoint("m", server.url, **options), cache, budget, give_up_after=give_up_after)
    return completions, [answer.text for answer in completions.ask([request(text) for text in texts])]


def request(text: str, **options) -> Request:
    return Request([{"role": "user", "content": text}], **options)


def test_an_endpoint_is_sent_prompt_and_parameters_and_no_key_that_was_not_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    with stand_in(lambda prompt, before: f"to {prompt}") as server:
        completions = Completions(Endpoint("m", server.url))
        answer = completions.ask([request("hello", temperature=0.5, max_tokens=7, seed=3)])[0]
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens, answer.truncated) == ("to hello", 10, 5, False)
    wanted = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5, "max_tokens": 7, "seed": 3}
    assert server.asked == [wanted]
    assert "sk-of-openai" not in json.dumps(server.headers)
    assert (completions.usage.requests, completions.usage.tokens) == (1, 15)


def test_the_named_key_is_sent_and_reaches_neither_errors_nor_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    refused = Reply(b'{"error": {"message": "wrong key: sk-secret-123"}}', status=401)
    with stand_in(lambda prompt, before: refused if prompt == "refuse" else prompt) as server:
        completions, _ = asked_of(server, ["a"], tmp_path / "cache", key_env="MY_KEY")
        assert server.headers[0]["authorization"] == "Bearer sk-secret-123"
        with pytest.raises(InstructLiteError, match="the endpoint refuses") as raised:
            completions.ask([request("refuse")])
    assert "sk-secret-123" not in str(raised.value)
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_keys_come_from_the_environment_only(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InstructLiteError, match="OPENAI_API_KEY: not set"):
        Endpoint("m")
    with pytest.raises(InstructLiteError, match="MY_KEY: not set"):
        Endpoint("m", "http://127.0.0.1:1/v1", key_env="MY_KEY")
    with pytest.raises(InstructLiteError, match="user name or password"):
        Endpoint("m", "http://me:secret@127.0.0.1:1/v1")
    with pytest.raises(InstructLiteError, match="expected an address"):
        Endpoint("m", "127.0.0.1:1")


def test_a_missing_openai_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InstructLiteError, match=r"pip install 'instructlite\[judge\]'"):
        Endpoint("m", "http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    "bad",
    [
        Reply(b"", status=429),
        Reply(b"", status=500),
        Reply(b"<html>gateway</html>", status=502),
        Reply(b"not json"),
        Reply(b"[]"),
        Reply(b'{"choices": []}'),
        Reply(b'{"choices": [{"message": null}]}'),
        Reply(b'{"choices": [{"message": {"content": 7}}]}'),
        Reply(b'{"choices": [[]]}'),
        Reply(b"\xff\xfe"),
        Reply(None),
        Reply("  \n"),
    ],
)
def test_what_is_broken_is_asked_again_and_then_missing(bad):
    with stand_in(lambda prompt, before: bad if prompt == "never" or before < 2 else "good") as server:
        completions, said = asked_of(server, ["late", "never"], retries=3)
    assert said == ["good", None]
    assert Counter(server.prompts) == {"late": 3, "never": 4}
    usage = completions.usage
    assert (usage.requests, usage.asked, usage.missing, sum(usage.faults.values())) == (7, 2, 1, 1)


def test_a_timeout_is_asked_again_and_then_missing():
    release = threading.Event()

    def answer(prompt, before):
        if before == 0 or prompt == "never":
            release.wait(5)
        return "good"

    with stand_in(answer) as server:
        completions, said = asked_of(server, ["late", "never"], retries=1, timeout=0.2)
        release.set()
    assert said == ["good", None]
    assert Counter(server.prompts) == {"late": 2, "never": 2}
    assert list(completions.usage.faults) == ["Request timed out."]


def test_what_the_endpoint_will_not_answer_is_missing_and_not_asked_again():
    refused = Reply(b'{"error": {"message": "context length exceeded"}}', status=400)
    with stand_in(lambda prompt, before: refused if prompt == "long" else "good") as server:
        completions, said = asked_of(server, ["long", "short"])
    assert said == [None, "good"]
    assert len(server.asked) == 2
    assert "context length exceeded" in next(iter(completions.usage.faults))


def test_thoughts_are_no_part_of_an_answer_and_cut_off_answers_are_marked():
    replies = {
        "thinks": Reply("<think>hm</think>\n\n42"),
        "only thinks": Reply("<think>hm", finish_reason="length"),
        "cut": Reply("half of", finish_reason="length"),
        "filtered": Reply("x", finish_reason="content_filter"),
    }
    with stand_in(lambda prompt, before: replies[prompt]) as server:
        completions = Completions(Endpoint("m", server.url, retries=0))
        answers = completions.ask([request(text) for text in replies])
    assert [(answer.text, answer.truncated) for answer in answers] == [("42", False), (None, True), ("half of", True), (None, False)]


def test_nothing_is_asked_twice_not_even_by_the_next_run(tmp_path):
    fake = FakeCompleter(lambda text: Answer(None, "no") if text == "c" else f"to {text}")
    first = Completions(fake, tmp_path / "cache")
    assert [a.text for a in first.ask([request("a"), request("b"), request("a"), request("c")])] == ["to a", "to b", "to a", None]
    assert fake.asked == ["a", "b", "c"]
    second = Completions(fake, tmp_path / "cache")
    again = second.ask([request("a"), request("c"), request("d")])
    assert [answer.text for answer in again] == ["to a", None, "to d"]
    assert fake.asked == ["a", "b", "c", "c", "d"]  # what was missing is asked again
    assert (second.usage.kept, second.usage.asked) == (1, 2)
    assert again[0].created


def test_other_parameters_another_seed_or_another_model_are_other_questions(tmp_path):
    fake = FakeCompleter()
    completions = Completions(fake, tmp_path / "cache")
    different = [request("a"), request("a", temperature=1.0), request("a", max_tokens=5), request("a", seed=1)]
    completions.ask(different)
    assert len(fake.asked) == 4
    fake.identity = "other weights"
    Completions(fake, tmp_path / "cache").ask(different)
    assert len(fake.asked) == 8


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_budget_of_requests_is_kept_to_and_the_next_run_goes_on(tmp_path, parallel):
    def answer(text):
        threading.Event().wait(0.02)  # so that all are under way at once
        return text

    fake = FakeCompleter(answer, parallel=parallel)
    questions = [request(str(i)) for i in range(10)]
    for allowed in (2, 5):
        completions = Completions(fake, tmp_path / "cache", Budget(max_requests=allowed))
        answers = completions.ask(questions)
        assert len(fake.asked) == allowed == sum(answer.text is not None for answer in answers)
        assert completions.usage.unasked == 10 - allowed == completions.usage.missing
        assert {answer.fault for answer in answers if answer.text is None} == {"not asked: the budget is spent"}
    assert len(set(fake.asked)) == 5


def test_tokens_and_cost_are_counted_over_all_runs_and_end_the_asking(tmp_path):
    questions = [request(str(i)) for i in range(10)]
    tokens = Completions(FakeCompleter(), tmp_path / "tokens", Budget(max_tokens=40))
    tokens.ask(questions)
    assert tokens.usage.tokens == 45  # 15 an answer: the third passes the limit
    prices = {"input_price": 1.0, "output_price": 100.0}  # 10 and 5 tokens: 0.00051 an answer
    cost = Completions(FakeCompleter(), tmp_path / "cost", Budget(max_cost=0.001, **prices))
    cost.ask(questions)
    assert cost.usage.cost == pytest.approx(2 * 0.00051)
    again = Completions(FakeCompleter(), tmp_path / "cost", Budget(max_cost=0.002, **prices))
    again.ask(questions)
    assert again.usage.cost == pytest.approx(4 * 0.00051)
    with pytest.raises(InstructLiteError, match="without input_price"):
        Budget(max_cost=1.0)


def test_tokens_that_an_endpoint_does_not_count_are_estimated():
    with stand_in(lambda prompt, before: Reply("12345678", usage=None)) as server:
        completions, _ = asked_of(server, ["1234"])
    assert (completions.usage.estimated, completions.usage.tokens) == (1, 2 + 3)


def test_an_endpoint_that_is_down_ends_the_asking_with_what_was_answered_kept(tmp_path):
    with stand_in(lambda prompt, before: "fine" if prompt == "0" else Reply(b"", status=503)) as server:
        asked_of(server, ["0"], tmp_path / "cache")
        with pytest.raises(InstructLiteError, match=r"3 requests in a row brought no answer \(the last: HTTP 503\)"):
            asked_of(server, [str(i) for i in range(50)], tmp_path / "cache", retries=0, give_up_after=3, parallel=2)
        assert len(server.asked) < 10
    assert Completions(Endpoint("m", server.url), tmp_path / "cache").ask([request("0")])[0].text == "fine"


def test_several_are_asked_at_once():
    together = threading.Barrier(4, timeout=10)

    def answer(prompt, before):
        together.wait()
        return "good"

    with stand_in(answer) as server:
        assert asked_of(server, list("abcd"), parallel=4)[1] == ["good"] * 4


def test_requests_and_tokens_are_spaced(monkeypatch):
    clock, waits = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", waits.append)
    pace = Pace(requests_per_minute=60, tokens_per_minute=600)
    pace.wait()
    pace.wait()
    pace.used(50)  # five seconds' worth
    pace.wait()
    clock[0] = 200.0
    pace.wait()
    assert waits == pytest.approx([0, 1, 7, 0])


def test_a_file_that_is_no_cache_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("something else, long enough to be no database at all " * 20)
    with pytest.raises(InstructLiteError, match="no answers can be kept there"):
        Completions(FakeCompleter(), tmp_path / "cache")


ASKING = """
import sys
from instructlite.data.generating.completer import Completions, Endpoint, Request
completions = Completions(Endpoint("m", sys.argv[1], parallel=2), sys.argv[2])
answers = completions.ask([Request([{"role": "user", "content": str(i)}]) for i in range(12)])
assert [answer.text for answer in answers] == [f"to {i}" for i in range(12)]
"""


def test_kill_9_half_way_and_again_asks_for_the_rest_only(tmp_path):
    half, hold = threading.Event(), threading.Event()

    def answer(prompt, before):
        if len(server.asked) > 6 and not hold.is_set():
            half.set()
            hold.wait(20)
        return f"to {prompt}"

    with stand_in(answer) as server:
        command = [sys.executable, "-c", ASKING, server.url, str(tmp_path / "cache")]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
        assert half.wait(60)
        deadline = time.monotonic() + 10
        while len(server.asked) < 8 and time.monotonic() < deadline:  # both of its threads wait for an answer
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        under_way = set(server.prompts[-2:])
        hold.set()
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    twice = {prompt for prompt, count in Counter(server.prompts).items() if count > 1}
    assert len(set(server.prompts)) == 12
    assert twice == under_way  # their answers never arrived
