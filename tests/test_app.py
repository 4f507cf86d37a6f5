"""The server without a browser: who may ask, what there is to ask for, how much; logins; and the booth behind the arena."""

import json
import random

import pytest
from browsing import make_run
from starlette.testclient import TestClient
from typer.testing import CliRunner

from instructlite import cli
from instructlite.config import BaseOptions
from instructlite.errors import InstructLiteError
from instructlite.feedback.app.booth import Booth, ballot_of, read_prompts
from instructlite.feedback.app.guard import MAX_BODY, POSTS_PER_MINUTE, Bucket
from instructlite.feedback.app.markup import escape
from instructlite.feedback.app.server import Address, application
from instructlite.feedback.app.visitors import VOTER, read_users
from instructlite.feedback.ballots import Showing
from instructlite.feedback.store import Store
from instructlite.models.engine import Engine
from instructlite.models.sampling import Sampling

HERE = "http://127.0.0.1:7860"
ASKED = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def engine(tiny_path, tmp_path_factory):
    with Engine.load(make_run(tmp_path_factory.mktemp("run"), tiny_path), BaseOptions(dtype="float32")) as engine:
        yield engine


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path, rng=random.Random(0))
    yield opened
    opened.close()


@pytest.fixture
def visit(engine, store):
    """visit(...) is a client of a new application."""

    def visiting(base_url=HERE, **options):
        return TestClient(application(engine, store, **options), base_url=base_url, follow_redirects=False)

    return visiting


# --- who may ask, and for what ------------------------------------------------------------------------------------------------


def test_pages_come_with_a_policy_and_without_leave_for_other_sites(visit):
    found = visit().get("/arena/", headers={"Sec-Fetch-Site": "none"})
    assert found.status_code == 200
    policy = found.headers["content-security-policy"]
    assert all(part in policy for part in ("default-src 'self'", "script-src-attr 'none'", "img-src 'self' data:", "frame-src 'none'"))
    assert not [name for name in found.headers if name.startswith("access-control")]
    assert "httponly" in found.headers["set-cookie"].lower() and VOTER in found.headers["set-cookie"]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1.evil.example:7860"])
def test_other_sites_are_refused(visit, method, origin):
    path = "/arena/" if method == "GET" else "/arena/gradio_api/queue/join"
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    found = visit().request(method, path, headers=headers)
    assert found.status_code in (403, 405)
    assert "access-control-allow-origin" not in found.headers


def test_a_foreign_name_for_this_machine_gets_nothing(visit):
    client = visit()
    assert client.get("/", headers={"Host": "evil.example:7860"}).status_code == 403
    assert [client.get("/", headers={"Host": host}).status_code for host in ("localhost:7860", "[::1]:7860")] == [307, 307]


@pytest.mark.parametrize(
    "path",
    ["gradio_api/file=/etc/passwd", "gradio_api/file/etc/passwd", "gradio_api/proxy=http://evil.example", "gradio_api/info", "monitoring",
     "gradio_api/openapi.json", "gradio_api/runs", "gradio_api/stream/x", "custom_component/1/client/component/x", "gradio_api/deep_link",
     "static/..%2f..%2f..%2fetc/passwd", "assets/%2e%2e/%2e%2e/routes.py", "static/%252e%252e/x", "gradio_api/mcp/", "login",
     "gradio_api/vibe-code", "gradio_api/call/answer", "../ui/..%2fserver.py", "gradio_api/upload_progress", "pwa_icon"],
)  # fmt: skip
def test_what_the_pages_do_not_need_is_not_there(visit, path):
    client = visit()
    assert client.get(f"/compare/{path}").status_code in (404, 405)
    assert client.post(f"/compare/{path}").status_code in (404, 405)


def test_files_cannot_be_sent_and_pages_not_served_are_not_there(visit):
    client = visit(pages=["/arena"])
    assert client.post("/arena/gradio_api/upload", files={"files": ("x.txt", b"x")}).status_code == 404
    assert client.get("/compare/").status_code == client.get("/compare/config").status_code == 404
    assert "/compare/" not in client.get("/arena/config").text
    assert client.get("/ui/server.py").status_code == client.get("/ui/..%2fserver.py").status_code == 404


def test_the_arena_knows_no_names_before_a_vote(visit, engine):
    client = visit()
    text = client.get("/arena/").text + client.get("/arena/config").text
    assert not [pane.name for pane in engine.panes[1:] if pane.name in text or pane.sha256[:12] in text]


def test_large_bodies_and_many_requests_are_refused(visit):
    client = visit()
    join = "/compare/gradio_api/queue/join"
    assert client.post(join, content=b"x" * (MAX_BODY + 1)).status_code == 413
    codes = [client.post("/compare/gradio_api/nothing").status_code for _ in range(3)]
    codes += [client.post(join, json={}).status_code for _ in range(POSTS_PER_MINUTE + 1)]
    assert codes[:3] == [404] * 3 and codes[-1] == 429 and codes[5] == 422


def test_a_bucket_fills_again():
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    assert [bucket.take("a") for _ in range(61)] == [True] * 60 + [False]
    assert bucket.take("b")
    now[0] = 1.0
    assert [bucket.take("a"), bucket.take("a")] == [True, False]


def call(client, page, button, **values) -> str:
    """Press a button as a script would, with whatever values: the events of the answer as text."""
    config = client.get(f"/{page}/config").json()
    parts = {part["id"]: part["props"] for part in config["components"]}
    ids = {props.get("elem_id"): number for number, props in parts.items()}
    [event] = [one for one in config["dependencies"] if [ids[button], "click"] in one["targets"]]
    data = [values.get((parts[number].get("elem_id") or "").replace("-", "_"), parts[number].get("value")) for number in event["inputs"]]
    body = {"data": data, "fn_index": event["id"], "session_hash": "abc", "trigger_id": ids[button]}
    assert client.post(f"/{page}/gradio_api/queue/join", json=body).status_code == 200
    return client.get(f"/{page}/gradio_api/queue/data", params={"session_hash": "abc"}).text


@pytest.mark.parametrize(
    "values, told",
    [
        ({"prompt": "x" * 8001}, "the prompt has 8,001 characters"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "x", "system": "y" * 4001}, "the system prompt has 4,001"),
        ({"prompt": "x", "temperature": 3}, "temperature"),
        ({"prompt": "x", "length": 10**6}, "length"),
        ({"prompt": "x", "top_p": -1}, "top"),
        ({"prompt": "x", "panes": ["../../etc"]}, "etc"),
    ],
)
def test_limits_hold_for_whoever_calls_the_server_himself(visit, values, told, capsys):
    with visit() as client:
        events = call(client, "compare", "send", **values)
        assert "ready" not in events
        # Either we say why, or Gradio has refused the value before we saw it, and does not say why.
        assert told in events or '"success":false' in events.replace(" ", "")
        assert "Traceback" not in events


def test_somebody_without_a_cookie_cannot_vote_or_ask(visit, store):
    with visit() as client:
        assert "not known" in call(client, "arena", "next")
        assert "not known" in call(client, "arena", "vote-1")
    assert store.votes() == []


def test_a_visitor_may_ask_only_so_often(visit, monkeypatch):
    monkeypatch.setattr("instructlite.feedback.app.streams.REQUESTS_PER_MINUTE", 2)
    with visit() as client:
        told = [call(client, "compare", "send", prompt="x", length=1) for _ in range(3)]
    assert ["answers ready" in one for one in told] == [True, True, False]
    assert "wait a moment" in told[-1]


# --- logins -------------------------------------------------------------------------------------------------------------------


def test_an_address_for_others_needs_a_login(engine, store):
    with pytest.raises(InstructLiteError, match="--login"):
        application(engine, store, address=Address("0.0.0.0"))
    for host in ("127.0.0.1", "::1", "localhost"):
        Address(host).check(None)
    Address("0.0.0.0").check(read_users(["ann:correct horse"]))


def test_who_has_not_logged_in_gets_the_login_page_and_nothing_else(visit, store):
    client = visit("http://example.org", users=read_users(["ann:correct horse"]), address=Address("0.0.0.0"))
    assert client.get("/arena/").headers["location"] == client.get("/").headers["location"] == "/login"
    assert client.get("/arena/config").status_code == client.post("/arena/gradio_api/queue/join", json={}).status_code == 401
    assert "password" in client.get("/login").text
    assert client.post("/login", data={"name": "ann", "password": "wrong"}).status_code == 403
    assert client.post("/login", data={"name": "bob", "password": "correct horse"}).status_code == 403
    found = client.post("/login", data={"name": "ann", "password": "correct horse"})
    assert found.status_code == 303 and "HttpOnly" in found.headers["set-cookie"]
    assert client.get("/arena/").status_code == 200
    with client:
        assert "not known" not in call(client, "arena", "next")
    assert store.voter(name="ann").name == "ann"
    assert client.post("/logout").status_code == 303
    assert client.get("/arena/").status_code == 303


def test_passwords_cannot_be_tried_out(visit):
    client = visit("https://example.org", users=read_users(["ann:correct horse"]), address=Address("0.0.0.0"))
    codes = [client.post("/login", data={"name": "ann", "password": f"{number}"}).status_code for number in range(8)]
    assert codes[0] == 403 and codes[-1] == 429
    assert client.post("/login", data={"name": "ann", "password": "correct horse"}).status_code == 429


def test_a_file_of_logins_is_for_its_owner_only(tmp_path):
    file = tmp_path / "logins"
    file.write_text("# voters\nann:correct horse\n\nbob:battery staple\n")
    file.chmod(0o644)
    with pytest.raises(InstructLiteError, match="chmod 600"):
        read_users([str(file)])
    file.chmod(0o600)
    users = read_users([str(file)])
    assert users.knows("bob", "battery staple") and not users.knows("bob", "correct horse") and not users.knows("eve", "")
    assert "battery" not in repr(vars(users))
    file.write_text("ann:short\n")
    with pytest.raises(InstructLiteError, match=r"logins:1: .*at least 8"):
        read_users([str(file)])


# --- the booth ----------------------------------------------------------------------------------------------------------------


def battle_of(booth, voter, count=2):
    battle = booth.ask(voter, ASKED, count)
    texts = battle.stream.result().texts
    return battle, texts


def test_answers_can_be_voted_on_when_all_are_there_and_names_come_after(engine, store):
    booth, voter = Booth(engine, store, sampling=Sampling(6)), store.voter().key
    battle, texts = battle_of(booth, voter, 3)
    showing = battle.showing
    assert showing.answers == (None, None, None)
    ballot = ballot_of(0, Showing(showing.ticket, showing.prompt, tuple(texts), False), nothing(3), "")
    with pytest.raises(InstructLiteError, match="not finished"):
        booth.vote(voter, showing.ticket, ballot)
    booth.finish(battle, texts)
    assert booth.open(voter).answers == tuple(texts[number] for number in battle.order)
    with pytest.raises(InstructLiteError, match="vote first"):
        booth.reveal(voter, showing.ticket)
    assert booth.vote(voter, showing.ticket, ballot) and not booth.vote(voter, showing.ticket, ballot)
    booth.score(voter, booth.store.show(store.votes()[0].item, voter))
    told = booth.reveal(voter, showing.ticket)
    assert sorted(one.candidate.name for one in told) == ["base", "quokka", "zebra"]
    assert all(set(one.scores) == {"reward"} for one in told)
    # What is told is true: each text is the one that its candidate gives for its seed.
    for answer in store.votes()[0].answers:
        again = engine.submit(ASKED, [answer.candidate.name], booth.sampling, seed=answer.seed).result()
        assert again.texts == [answer.text]


def nothing(count):
    return {what: [None] * count for what in ("ranks", "likert", "flags", "edits")}


def test_every_pane_answers_before_one_answers_twice(engine, store):
    booth, voter = Booth(engine, store, sampling=Sampling(2)), store.voter().key
    battle, texts = battle_of(booth, voter, 4)
    booth.finish(battle, texts)
    names = [pane for (pane,) in store._db.execute("SELECT name FROM answers JOIN candidates ON candidates.id = candidate_id")]
    assert len(names) == 4 and set(names) == {"base", "zebra", "quokka"}
    with pytest.raises(InstructLiteError, match="2 to 4"):
        booth.ask(voter, ASKED, 5)


def test_next_skips_what_was_not_wanted_and_prompts_come_once(engine, store):
    booth = Booth(engine, store, [{"prompt": ASKED}, {"prompt": ASKED}], Sampling(2))
    author, voter = store.voter().key, store.voter().key
    for _ in range(2):
        booth.finish(*battle_of(booth, author))
    first = booth.next(voter)
    second = booth.next(voter, frozenset({first.ticket}))
    assert second.ticket != first.ticket
    assert booth.next(voter, frozenset({first.ticket, second.ticket})) is None
    assert [booth.prompt(voter) is None for _ in range(3)] == [False, False, True]
    assert booth.prompt(author) is not None


def test_a_ballot_holds_what_was_said_and_not_what_was_left():
    showing = Showing("t", ASKED, ("one", "two"), False)
    said = {"ranks": [None] * 9, "likert": [None] * 9, "flags": [[]] * 9, "edits": ["one ", "better", *[None] * 7]}
    ballot = ballot_of(1, showing, said, " ")
    assert (ballot.ranks, ballot.likert, ballot.flags, ballot.edits, ballot.comment) == ((None, 0), None, None, (None, "better"), None)
    flagged = ballot_of("tie", showing, said | {"flags": [["sexual"], []] + [[]] * 7}, "why")
    assert (flagged.ranks, flagged.flags, flagged.comment) == ((0, 0), (("sexual",), ()), "why")
    assert ballot_of("bad", showing, said, "").all_bad
    assert ballot_of("ranks", showing, said | {"likert": [2, 6] + [None] * 7}, "").judgements(2)[1]["rank"] == 0
    with pytest.raises(InstructLiteError, match="every answer a rank"):
        ballot_of("ranks", showing, said | {"ranks": [1] + [None] * 8}, "")


def test_text_is_escaped_for_html_and_for_templates():
    assert escape("<b a='x'>&${x}`{{y}}@children\x00\r\n") == (
        "&lt;b a=&#x27;x&#x27;&gt;&amp;&#36;&#123;x&#125;&#96;&#123;&#123;y&#125;&#125;&#64;children\N{REPLACEMENT CHARACTER}\n"
    )


def test_prompts_are_read_without_their_answers(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "completion": "So.", "category": "open_qa"}) + "\n")
    assert read_prompts(str(file)) == [{"prompt": ASKED, "category": "open_qa"}]


# --- the command --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, told",
    [
        (["--host", "0.0.0.0"], "needs --login"),
        (["--page", "nothing"], "choose compare, arena, insight"),
        (["--login", "nobody"], "neither a file nor"),
        (["--prompts", "nothing.jsonl"], "nothing.jsonl"),
        ([], "no adapters"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(tmp_path, options, told):
    done = CliRunner().invoke(cli.app, ["app", str(tmp_path), *options])
    assert isinstance(done.exception, InstructLiteError)
    assert told in str(done.exception) and "\n" not in str(done.exception)
