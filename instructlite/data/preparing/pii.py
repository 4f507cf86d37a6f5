"""Personal data in texts: e-mail addresses, telephone numbers, IBANs, card numbers, IP addresses and keys.

Patterns, and what can be checked: Luhn for cards, mod 97 for IBANs, number plans (`phonenumbers`) for telephones. Names and street
addresses are not looked for: that takes a language model, such as presidio's; any function text -> spans serves as backend.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ...errors import require
from .steps import Sample, StepCount, map_texts


class Span(NamedTuple):
    start: int
    end: int
    kind: str


Backend = Callable[[str], Iterable[Span]]

_EMAIL = re.compile(r"(?<![\w.%+-])\w[\w.%+'-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----(?:[\s\S]{0,8000}?-----END [A-Z ]{0,20}PRIVATE KEY-----)?"
    r"|(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[\w-]{20,64}|hf_[A-Za-z0-9]{30,64}"
    r"|sk-(?:proj-|ant-|or-)?[\w-]{20,200}|[sr]k_live_[A-Za-z0-9]{16,128}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,128}"
    r"|eyJ[\w-]{8,1000}\.eyJ[\w-]{8,4000}\.[\w-]{16,1000})"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
# Length of an IBAN by country, so that capitals that follow one are not taken for its end.
_IBAN_LENGTHS = {
    code: int(length)
    for length, codes in {
        "15": "NO", "16": "BE", "18": "DK FI FO GL NL", "19": "MK SI", "20": "AT BA EE KZ LT LU XK", "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ TL", "24": "AD CZ ES MD PK RO SA SE SK TN VG", "25": "PT ST LY",
        "26": "IS TR", "27": "FR GR IT MC MR SM", "28": "AL AZ BY CY DO GT HU LB PL SV", "29": "BR EG PS QA UA", "30": "JO KW MU",
        "31": "MT SC", "32": "LC",
    }.items()
    for code in codes.split()
}  # fmt: skip
_CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
# Issuer prefixes with the lengths their numbers have: Visa, Mastercard, Amex, Diners, Discover, JCB, UnionPay.
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35\d{14}|62\d{14,17}"
)
_IPV4 = re.compile(r"(?<![\w.:/-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{4,34}(?![\w:])")
_PHONE = re.compile(r"(?<![\w.,/:=#$€£-])(?:\+ ?)?\(?\d(?:[ .()/-]{0,2}\d){6,16}(?![\w-]|[.,/:]\d)")
_YEARS = re.compile(r"(?:1[0-9]|20)\d\d\D+(?:1[0-9]|20)\d\d")
_NANP = re.compile(r"(?:\+?1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}")


def patterns(regions: Iterable[str] = ("US",), exact_phones: bool = True) -> Backend:
    """The built-in backend. regions: the countries whose telephone numbers are known without +; exact_phones False does without
    `phonenumbers`: numbers that begin with + and those of North America."""
    regions = tuple(regions)
    is_phone = _number_plan(regions) if exact_phones else _looks_like_phone
    checks: list[tuple[str, re.Pattern, Callable[[str], int]]] = [
        ("EMAIL", _EMAIL, len),
        ("KEY", _KEY, len),
        ("IBAN", _IBAN, _iban_length),
        ("CARD", _CARD, lambda text: len(text) if _is_card(text) else 0),
        ("IP", _IPV6, lambda text: len(text) if _is_public_address(text) else 0),
        ("IP", _IPV4, lambda text: len(text) if _is_public_address(text) else 0),
        ("PHONE", _PHONE, lambda text: len(text) if is_phone(text) else 0),
    ]
    hints = re.compile(
        r"@|\d{3}|\d\.\d|\d[ ().-]{1,2}\d|[A-Z]{2}\d\d|:\w{1,4}:|-----BEGIN|A(?:KI|SI|Iz)[Aa]|_[A-Za-z0-9]{16}|eyJ|sk-|xox|glpat"
    )

    def find(text: str) -> list[Span]:
        if not hints.search(text):  # most texts: seven patterns need not look
            return []
        found: list[Span] = []
        for kind, pattern, accepted in checks:
            for match in pattern.finditer(text):
                end = match.start() + accepted(match[0])
                if end > match.start() and all(end <= span.start or span.end <= match.start() for span in found):
                    found.append(Span(match.start(), end, kind))
        return found

    return find


def mask(text: str, find: Backend) -> str:
    """The text with each find replaced by its kind in brackets, such as [EMAIL]."""
    for start, end, kind in _apart(find(text)):
        text = f"{text[:start]}[{kind}]{text[end:]}"
    return text


def personal_data(find: Backend, action: str) -> Callable[[Sample, StepCount], str | None]:
    """action: "count", "mask" or "drop". A dropped row is masked all the same, since rejected rows are written too."""

    def judge(sample: Sample, count: StepCount) -> str | None:
        kinds = sorted({span.kind for text in _texts(sample) for span in find(text)})
        if not kinds:
            return None
        counter = count.changed if action == "mask" else count.noticed
        if action != "drop":
            counter.update(kinds)
        if action != "count":
            sample.record = map_texts(sample.record, lambda text: mask(text, find))
        return f"personal data ({', '.join(kinds)})" if action == "drop" else None

    return judge


def _texts(sample: Sample) -> Iterator[str]:
    yield from (turn["content"] for turn in sample.turns)
    yield from sample.answers
    if "text" in sample.record:
        yield sample.record["text"]


def _apart(spans: Iterable[Span]) -> list[Span]:
    """Last first, so that replacing one moves none of the others; of two that overlap the longer, as a backend may give both."""
    chosen: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start - span.end):
        if all(span.end <= other.start or other.end <= span.start for other in chosen):
            chosen.append(span)
    return sorted(chosen, reverse=True)


def _is_card(text: str) -> bool:
    digits = [int(digit) for digit in text if digit.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return bool(_ISSUER.fullmatch("".join(map(str, digits)))) and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _iban_length(text: str) -> int:
    """Characters of the IBAN that the text begins with. 0: its check digits are wrong."""
    places = [place for place, character in enumerate(text, 1) if character != " "][: _IBAN_LENGTHS.get(text[:2], 0)]
    compact = "".join(text[place - 1] for place in places)
    if len(compact) < _IBAN_LENGTHS.get(text[:2], 99):
        return 0
    moved = compact[4:] + compact[:4]
    return places[-1] if int("".join(str(int(character, 36)) for character in moved)) % 97 == 1 else 0


def _is_public_address(text: str) -> bool:
    """False for private networks, and for four small numbers, which are a version or a section (1.2.3.4, and 8.8.8.8, nobody's own)."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 6 or max(address.packed) > 31)


def _looks_like_phone(text: str) -> bool:
    digits = sum(map(str.isdigit, text))
    return (text.startswith("+") and 8 <= digits <= 15 and digits > 8) or bool(_NANP.fullmatch(text.strip()))


def _number_plan(regions: tuple[str, ...]) -> Callable[[str], bool]:
    phonenumbers = require("phonenumbers", "data")

    def is_phone(text: str) -> bool:
        international = text.startswith("+")
        # A bare run of digits is any number; years and sums of thousands are no telephones either.
        if not international and (text.isdigit() or _YEARS.search(text) or re.search(r"\D{2,}", text.strip("()").replace(") ", "-"))):
            return False
        for region in (None,) if international else regions:
            try:
                number = phonenumbers.parse(text, region)
            except phonenumbers.NumberParseException:
                continue
            if phonenumbers.is_valid_number(number):
                return True
        return False

    return is_phone
