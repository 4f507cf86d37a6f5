"""What people see in a real browser: panes are what they say, votes are saved, names are kept back, and no text does anything."""

import json
import re
import threading
import time
from dataclasses import replace

import pytest
import torch
from browsing import NAMES, Visit, make_run, served
from conftest import chromium
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner

from instructlite import cli
from instructlite.feedback.ballots import Answer, Ballot, Candidate
from instructlite.models.base import Base
from instructlite.models.sampling import Sampling

PROMPT = "Why is the sky blue?"
pytestmark = pytest.mark.slow  # minutes of a browser, whose waits are not to be had beside other tests
SHOT = Sampling(24, temperature=0.7)
LETTERS = re.compile(r"\W")  # what the reader of training data may leave out is none of them
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # what no HTML can hold


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), tiny_path)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(run, browser):
    prompts = [{"prompt": [{"role": "user", "content": f"Question {number}?"}]} for number in range(50)]
    with served(run, prompts=prompts, sampling=SHOT) as server:
        yield server


@pytest.fixture
def visit(browser, server):
    visits = []

    def visiting(**options):
        visits.append(Visit(browser, server, **options))
        return visits[-1]

    yield visiting
    for one in visits:
        assert one.outside == [], "a request left the page"
        assert one.alarms == []
        one.close()


def plain(run, pane, base: Base, new_tokens) -> str:
    """What PEFT and transformers alone make of it, greedily."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    if pane != "base":
        model = PeftModel.from_pretrained(model, run / pane)
    ids = torch.tensor([base.encode_prompt([{"role": "user", "content": PROMPT}])])
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=base.stop_ids, pad_token_id=base.pad_id)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", base.decode(output[0, ids.shape[1] :].tolist()))


WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const lengths = [...document.querySelectorAll('#now .card .notes')].map((notes) => parseInt(notes.innerText));
    if (lengths.length && String(lengths) !== String(window.seen.at(-1))) window.seen.push(lengths);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


def greedy_texts(visit) -> list[str]:
    here = visit()
    page = here.open("compare")
    here.settings(temperature=0, length=90)
    page.evaluate(WATCH)
    here.ask(PROMPT)
    here.said("3 answers ready")
    seen = page.evaluate("window.seen")
    assert len(seen) >= 3, "nothing was streamed"
    writing = [[now for now, last in zip(tokens, seen[-1], strict=True) if now != last] for tokens in seen]
    assert all(len(set(tokens)) <= 1 for tokens in writing), "in lock-step: no pane is ahead"
    return here.texts()


def test_three_panes_stream_differ_and_say_what_plain_peft_says(visit, run, server, monkeypatch):
    """unslothai/unsloth#4503: the fine-tuned model was shown as the base."""
    expected = [plain(run, pane, server.engine.model.base, 90) for pane in ("base", *NAMES)]
    assert greedy_texts(visit) == expected
    assert len(set(expected)) == 3
    base, zebra, quokka = server.engine.panes
    monkeypatch.setattr(server.engine, "panes", [base, replace(zebra, role=quokka.role), replace(quokka, role=zebra.role)])
    assert greedy_texts(visit) != expected


def test_a_pane_says_which_adapter_it_is_and_how_it_is_scored(visit, server):
    here = visit()
    page = here.open("compare")
    here.settings(length=8)
    here.ask(PROMPT)
    page.wait_for_selector("#now .card .notes >> text=reward")
    card = page.get_by_role("region", name="quokka, answer 1")
    assert f"sha256 {server.engine.panes[2].sha256[:12]} · verified" in card.inner_text()
    assert re.search(r"8 tokens\s.*tokens/s\s+cut at the length\s+reward [+-]\d", card.inner_text(), re.DOTALL)
    here.ask("And at night?")
    page.get_by_role("region", name="quokka, answer 2").wait_for()
    here.said("3 answers ready")
    assert page.get_by_role("region", name="quokka, answer 1").count() == page.get_by_role("region", name="quokka, answer 2").count() == 1


def begun(here):
    """The page, on which answers have begun that would go on for long."""
    page = here.open("compare")
    here.settings(temperature=0, length=400)
    here.ask(PROMPT)
    page.wait_for_selector("#now .card .notes")
    return page


def test_stop_ends_the_answers_and_the_next_question_is_answered(visit):
    here = visit()
    page = begun(here)
    page.click("#stop")
    here.said("Stopped")
    assert "stopped" in page.locator("#now .card").first.inner_text()
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('.card').length === 0")
    page.locator("#length input[type=number]").fill("4")
    here.ask("Again?")
    here.said("3 answers ready")


@pytest.fixture
def held_scores(server, monkeypatch):
    """A reward model that takes its time, as one on a CPU does: until the event is set. With what it has given."""
    score, go_on, given = server.engine.score, threading.Event(), []

    def slow(*args):
        assert go_on.wait(900)
        given.append(score(*args))
        return given[-1]

    monkeypatch.setattr(server.engine, "score", slow)
    yield go_on, given
    go_on.set()


def test_a_new_conversation_is_empty_and_answers_though_the_last_one_was_being_written(visit):
    here = visit()
    page = begun(here)
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('.card').length === 0")
    page.wait_for_timeout(500)  # in which nothing of it may come back
    assert page.locator(".card, .turn").count() == 0
    page.locator("#length input[type=number]").fill("4")
    here.ask("Again?")
    here.said("3 answers ready")
    assert page.locator(".turn .text").all_text_contents() == ["Again?"]


def test_a_question_sent_too_early_is_kept_and_one_sent_at_once_is_answered(visit, held_scores):
    here = visit()
    page = here.open("compare")
    here.settings(temperature=0, length=60)
    here.ask(PROMPT)
    page.wait_for_selector("#now .card .notes")
    page.locator("#prompt textarea").fill("And at night?")
    page.locator("#prompt textarea").press("Shift+Enter")
    here.said("3 answers ready")
    assert page.locator("#prompt textarea").input_value() == "And at night?"
    assert page.locator("#send").is_disabled(), "the scores are still to come"
    held_scores[0].set()
    page.click("#send")
    page.get_by_role("region", name="quokka, answer 2").get_by_text("reward").wait_for()
    assert page.locator(".turn .text").all_text_contents() == [PROMPT, "And at night?"]
    assert page.locator(".card .notes >> text=reward").count() == 6


def test_who_leaves_stops_what_was_being_written_for_him(visit, server, monkeypatch):
    streams = []
    submit = server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda *a, **k: streams.append(submit(*a, **k)) or streams[-1])
    here = visit()
    page = begun(here)
    page.goto("about:blank")
    here.outside.clear()
    for _ in range(100):
        if streams[0].over:
            break
        page.wait_for_timeout(100)
    assert streams[0].cancelled and streams[0].over


def test_answers_that_break_off_are_told_and_the_next_ones_come(visit, server, monkeypatch):
    here = visit()
    page = here.open("arena")
    with monkeypatch.context() as broken:
        broken.setattr(server.engine._lockstep, "step", lambda: 1 / 0)
        page.keyboard.press("n")
        here.said("broke off")
    page.keyboard.press("n")
    here.said("2 answers ready")


def test_a_vote_by_keyboard_is_saved_revealed_kept_and_exported(visit, server, run, tmp_path):
    here = visit()
    server.recorder.sent.clear()
    server.recorder.on = True
    page = here.open("arena")
    before = len(server.store.votes())
    page.keyboard.press("n")
    here.said("2 answers ready")
    hidden = [*NAMES, *(pane.sha256[:12] for pane in server.engine.panes[1:]), server.engine.panes[0].fingerprint[:12], "tiny-llama"]
    sent = bytes(server.recorder.sent).decode(errors="replace")
    server.recorder.on = False
    assert "Answer A" in sent and "2 answers ready" in sent
    assert not [name for name in hidden if name in sent or name in page.content()], "a name before the vote"
    texts = here.texts("#answers")
    assert len(server.store.votes()) == before
    page.keyboard.press("2")
    told = here.said("Saved")
    vote = server.store.votes()[-1]
    best, other = sorted(vote.answers, key=lambda answer: answer.rank)
    assert (len(server.store.votes()), best.place, best.rank, other.rank) == (before + 1, 1, 0, 1)
    assert f"B is {best.candidate.name}" in told and f"A is {other.candidate.name}" in told
    page.wait_for_selector("#answers .notes >> text=reward")
    page.keyboard.press("1")  # too late: the buttons are off
    here.open("arena")
    assert re.search(r"\d+ of your votes (is|are) saved", here.said("saved"))
    target = tmp_path / "votes.jsonl"
    done = CliRunner().invoke(cli.app, ["votes", "export", str(run), "--to", "comparisons", "--output", str(target)])
    assert done.exit_code == 0, done.output
    row = json.loads(target.read_text(encoding="utf-8").splitlines()[-1])
    assert [LETTERS.sub("", row[side]) for side in ("rejected", "chosen")] == [LETTERS.sub("", text) for text in texts]


def test_who_votes_and_goes_on_at_once_sees_the_next_answers_only(visit, server, monkeypatch):
    score = server.engine.score
    monkeypatch.setattr(server.engine, "score", lambda *args: time.sleep(3) or score(*args))
    here = visit()
    page = here.open("arena")
    page.keyboard.press("n")
    here.said("2 answers ready")
    voted, asked = here.choosing(), page.locator("#asked").inner_text()
    page.keyboard.press("1")
    here.said("Saved")
    page.keyboard.press("n")
    following = here.choosing(asked)
    page.wait_for_timeout(4000)  # the scores come now; what was voted on may not come back with them
    assert here.choosing(asked) == following != voted
    page.keyboard.press("2")
    here.said("Saved")
    vote = server.store.votes()[-1]
    shown = [answer.text for answer in sorted(vote.answers, key=lambda answer: answer.place)]
    assert [LETTERS.sub("", text) for text in shown] == [LETTERS.sub("", text) for text in following]


def test_what_was_open_is_open_after_the_page_is_loaded_again(visit):
    here = visit()
    here.open("arena").keyboard.press("n")
    here.said("2 answers ready")
    texts = here.texts("#answers")
    here.open("arena")
    here.said("You have not voted on this yet")
    assert here.texts("#answers") == texts


def test_keys_do_nothing_while_somebody_types(visit, server):
    here = visit()
    page = here.open("arena")
    page.keyboard.press("n")
    here.said("2 answers ready")
    before = len(server.store.votes())
    here.unfold("Say more", "#comment textarea")
    page.locator("#comment textarea").press_sequentially("102030")
    page.wait_for_timeout(500)
    assert len(server.store.votes()) == before
    page.get_by_role("group", name="Answer A, 1 (worst) to 7 (best)").get_by_label("6").check()
    page.get_by_role("group", name="Answer B …").get_by_label("hallucination").check()
    page.get_by_label("Answer B as it should have been").fill("Because of Rayleigh scattering.")
    page.get_by_label("Your group").fill("physicists")
    page.click("#vote-1")
    here.said("Saved")
    vote = server.store.votes()[-1]
    a, b = sorted(vote.answers, key=lambda answer: answer.place)
    assert (a.rank, a.likert, a.flags, a.edited, vote.comment, vote.group) == (0, 6, (), None, "102030", "physicists")
    assert (b.likert, b.flags, b.edited) == (None, ("hallucination",), "Because of Rayleigh scattering.")


def test_three_answers_are_ranked(visit, server):
    here = visit()
    page = here.open("arena")
    here.unfold("Ask something yourself", "#question textarea")
    page.locator("#question textarea").fill("Name a tree.")
    page.locator("#count").get_by_label("3").check()
    page.click("#ask")
    here.said("3 answers ready")
    here.unfold("Say more", "#comment textarea")
    for letter, rank in zip("ABC", (2, 1, 2), strict=True):
        field = page.get_by_label(f"Rank of answer {letter}")
        field.fill(str(rank))
        field.press("Enter")
    page.click("#vote-rank")
    here.said("Saved")
    vote = server.store.votes()[-1]
    assert [answer.rank for answer in sorted(vote.answers, key=lambda answer: answer.place)] == [1, 0, 1]
    assert {answer.candidate.name for answer in vote.answers} == {"base", *NAMES}


PAYLOADS = [
    "<script>window.P=1</script>", "<img src=x onerror=window.P=1>", "<svg onload=window.P=1>",
    "<iframe src=javascript:parent.P=1></iframe>",
    "<iframe srcdoc='<script>parent.P=1</script>'></iframe>", "<body onload=window.P=1>", "<a href=javascript:window.P=1 id=x>x</a>",
    "<form action=//evil.example><button>x</button></form>", "<img src=//evil.example/a.png>", "![x](http://evil.example/b.png)",
    "[x](javascript:window.P=1)", "<link rel=stylesheet href=//evil.example/c.css>", "<style>@import '//evil.example/d.css';</style>",
    "<style>body{background:url(//evil.example/e.png)}</style>", "<div style=\"background:url('//evil.example/f.png')\">x</div>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>", "<base href=//evil.example/>", "<object data=//evil.example/g></object>",
    "<embed src=//evil.example/h>", "<video src=//evil.example/i onerror=window.P=1></video>", "<audio src=x onerror=window.P=1>",
    "<details open ontoggle=window.P=1>x</details>", "<input autofocus onfocus=window.P=1>", "<marquee onstart=window.P=1>x</marquee>",
    "<math><mi xlink:href=javascript:window.P=1>x</mi></math>", "<template><img src=x onerror=window.P=1></template>",
    "'\"><img src=x onerror=window.P=1>", "</div></section></main><script>window.P=1</script>", "--><script>window.P=1</script>",
    "]]><img src=x onerror=window.P=1>", "${window.P=1}", "`${window.P=1}`", "{{window.P=1}}", "{{#each value}}<b>{{this}}</b>{{/each}}",
    "{{{value}}}", "@children", "$$\\href{javascript:window.P=1}{x}$$", "&lt;img src=x onerror=window.P=1&gt;",
    "&#60;script&#62;window.P=1&#60;/script&#62;",
    "<button class=key-1 id=vote-1 onclick=window.P=1>x</button>", "\u202e<script>window.P=1</script>\u2066",
]  # fmt: skip
ELEMENTS = "script, img, iframe, form, a, style, link, base, object, embed, video, audio, details, input, svg, math, button, b, marquee"


def unharmed(page, inside: str, text: str) -> None:
    page.wait_for_timeout(300)
    assert page.evaluate("window.P") is None
    places = page.locator(f"{inside} .text").all()
    assert places
    for place in places:
        assert place.locator(ELEMENTS).count() == 0
        assert place.text_content().strip() == text


def test_no_text_does_anything(visit, server, monkeypatch):
    assert len(PAYLOADS) >= 40
    everything = "\n".join(PAYLOADS)
    monkeypatch.setattr(Base, "decode", lambda self, ids: everything)
    here = visit()
    page = here.open("compare")
    here.settings(length=2)
    here.ask("\n".join(PAYLOADS[:9]))
    here.said("3 answers ready")
    unharmed(page, "#now .turn", "\n".join(PAYLOADS[:9]))
    unharmed(page, "#now .card", everything)
    answers = [Answer(Candidate(name), everything, seed=number) for number, name in enumerate("ab")]
    server.store.add_item([{"role": "user", "content": everything}, {"role": "assistant", "content": everything},
                           {"role": "user", "content": everything}], answers)  # fmt: skip
    here.open("arena")
    for _ in range(20):  # other tests have left items that wait, too
        if page.locator("#answers .text").first.text_content().strip() == everything:
            break
        before = page.locator("#asked").inner_text()
        page.keyboard.press("n")
        page.wait_for_function("before => document.querySelector('#asked').innerText !== before", arg=before)
    unharmed(page, "#asked", everything)
    unharmed(page, "#answers", everything)
    here.unfold("Say more", "#comment textarea")
    page.get_by_label("Your group").fill("<img src=x onerror=window.P=1>")
    page.locator("h1").click()
    page.keyboard.press("1")
    here.said("Saved")
    unharmed(page, "#answers", everything)


def test_names_of_others_do_nothing_on_the_insight_page(visit, server):
    bad = "<img src=x onerror=window.P=1>${window.P=1}"
    item = server.store.add_item(
        [{"role": "user", "content": bad}], [Answer(Candidate(bad), "x"), Answer(Candidate("y"), "z")], use_case=bad
    )
    voter = server.store.voter(group=bad).key
    showing = server.store.show(item.id, voter)
    server.store.vote(showing.ticket, voter, Ballot.better(0))
    here = visit()
    page = here.open("insight")
    page.wait_for_selector("#insight caption >> text=By group of voters")
    assert page.locator("#insight td, #insight th").filter(has_text=bad).count() >= 2
    assert page.locator("#insight img").count() == 0
    assert page.evaluate("window.P") is None


@pytest.mark.parametrize("name", ["compare", "arena", "insight"])
def test_a_page_fits_a_phone_and_can_be_used_without_seeing_it(visit, name):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    here = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme="dark")
    page = here.open(name)
    if name == "compare":
        here.settings(length=16)
        here.ask("Name a tree. " + "x" * 300)
        here.said("3 answers ready")
        page.wait_for_selector("#send:enabled")
        page.wait_for_function("document.querySelector('#send').getAnimations().length === 0")  # on its way to be so it is pale
    if name == "arena":
        page.locator("#next").tap()
        here.said("2 answers ready")
        page.get_by_role("button", name="Say more").tap()
        assert [page.get_by_role("region", name=f"Answer {letter}").count() for letter in "AB"] == [1, 1]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page scrolls sideways"
    if name != "insight":
        assert page.locator("[aria-live]:not(.sr-only)").count() == 1  # .sr-only: Gradio's own, for its toasts
    found = [one for one in axe.run(page).response["violations"] if one["impact"] in ("serious", "critical")]
    assert not found, [(one["id"], [node["html"][:120] for node in one["nodes"][:3]]) for one in found]
