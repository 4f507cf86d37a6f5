"""Personal data: 60 planted finds, none on the starter data, and nothing of it in what is written."""

import random

import pytest

from instructlite.data import formats
from instructlite.data.preparing.pii import Span, mask, patterns, personal_data
from instructlite.data.preparing.steps import Sample, StepCount
from instructlite.errors import InstructLiteError

pytest.importorskip("phonenumbers")
# Documentation's, test and long expired ones; the keys are made of patterns.
PLANTED = {
    "EMAIL": [
        "jane.doe@gmail.com", "j_smith+news@mail.example.co.uk", "MARIA@UNI-HAMBURG.DE", "bob@acme.io", "info@my-company.org",
        "li.wei88@qq.com", "o'brien@tcd.ie", "first.last@sub.domain.com", "x@y.fr", "user%test@corp.com",
    ],
    "PHONE": [
        "+1 415 555 2671", "(212) 736-5000", "415-682-3344", "+44 20 7946 0958", "+49 30 901820",
        "+33 1 42 68 53 00", "650.253.0000", "+91 98765 43210", "1-800-356-9377", "+1 (650) 253-0000",
    ],
    "IBAN": [
        "DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR1420041010050500013M02606", "NL91ABNA0417164300",
        "CH93 0076 2011 6238 5295 7",
        "ES9121000418450200051332", "IT60 X054 2811 1010 0000 0123 456", "AT611904300234573201", "BE68 5390 0754 7034",
        "SE4550000000058398257466",
    ],
    "CARD": [
        "4111 1111 1111 1111", "4012888888881881", "5555555555554444", "5105-1051-0510-5100", "378282246310005",
        "371449635398431", "6011111111111117", "3530111333300000", "30569309025904", "2223003122003222",
    ],
    "IP": [
        "93.184.216.34", "151.101.1.69", "203.119.88.27", "2606:2800:220:1:248:1893:25c8:1946", "84.200.69.80",
        "185.199.108.153", "2a00:1450:4001:81b::200e", "176.103.130.130", "64.233.160.0", "52.94.236.248",
    ],
    "KEY": [
        "sk-proj-" + "a8Bc" * 10,
        "ghp_" + "Ab1" * 12,
        "AKIA" + "IOSFODNN7EXAMPLE",
        "hf_" + "QwErTyUiOp" * 3 + "asdf",
        "AIza" + "Sy1_" * 8 + "abc",
        "xoxb-" + "123456789012-abcdefghij",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
        "github_pat_" + "11ABCDEFG0" * 4,
        "sk_live_" + "4eC39HqLyjWD" * 2,
    ],
}  # fmt: skip
FIND = patterns()


def starter_texts() -> list[str]:
    rows = [row for kind in ("demonstrations", "comparisons") for row in formats.rows("starter", kind)]
    samples = [Sample(row.record, row.kind, row.file, row.line) for row in rows]
    return ["\n".join([sample.prompt, *sample.answers]) for sample in samples]


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_planted_is_found_as_what_it_is(kind):
    rng, texts = random.Random(0), starter_texts()
    for item in PLANTED[kind]:
        words = rng.choice(texts).split(" ")
        place = rng.randrange(len(words) + 1)
        text = " ".join([*words[:place], "(see", f"{item}).", *words[place:]])
        assert [(text[start:end].rstrip(")"), found) for start, end, found in FIND(text)] == [(item, kind)], text


def test_the_starter_data_gives_no_alarm():
    texts = starter_texts()
    assert len(texts) > 1000
    assert sum(bool(FIND(text)) for text in texts) <= 2


@pytest.mark.parametrize(
    "text",
    [
        "Version 1.2.3.4 of 10.0.0.1, on 127.0.0.1",
        "born 1939-1945, 2011-12-24, 12:30:45, std::vector, dead::beef",
        "4111 1111 1111 1112",  # Luhn
        "DE89 3704 0044 0532 0130 01",  # mod 97
        "population 330 000 000, 6,022,140,760 and $1234567890",
        "ISBN 978-3-16-148410-0, call 555",
        "user@localhost and a @ b",
        "1234567890123456",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text):
    assert not FIND(text)


def test_masking_names_the_kind_and_leaves_the_rest():
    assert mask("Write to a@b.de, or 93.184.216.34!", FIND) == "Write to [EMAIL], or [IP]!"
    assert mask("DE89 3704 0044 0532 0130 00 NOW", FIND) == "[IBAN] NOW"


def test_of_two_spans_that_overlap_the_longer_is_masked():
    assert mask("abcdef", lambda text: [Span(0, 2, "A"), Span(1, 5, "B")]) == "a[B]f"


@pytest.mark.parametrize("action", ["count", "mask", "drop"])
def test_each_action(action):
    count = StepCount("personal data")
    sample = Sample(
        {"prompt": [{"role": "user", "content": "me: a@b.de"}], "completion": "ok", "annotator": "x@y.z"}, "demonstrations", "f", 1
    )
    reason = personal_data(FIND, action)(sample, count)
    assert reason == ("personal data (EMAIL)" if action == "drop" else None)
    assert sample.turns[0]["content"] == ("me: a@b.de" if action == "count" else "me: [EMAIL]")
    assert sample.record["annotator"] == "x@y.z"  # columns are the user's own
    assert (count.noticed["EMAIL"], count.changed["EMAIL"]) == ((action == "count"), (action == "mask"))


def test_without_phonenumbers_the_command_to_install_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "phonenumbers", None)
    with pytest.raises(InstructLiteError, match=r"pip install 'instructlite\[data\]'"):
        patterns()
    assert patterns(exact_phones=False)("call (212) 736-5000")


def test_long_texts_take_no_quadratic_time():
    for text in ("a" * 200_000, "1" * 200_000, "1 " * 100_000, "a.b" * 70_000, "A1B2" * 50_000, "a@" * 100_000, "2001:" * 40_000):
        FIND(text)
