"""What the server takes from a page, checked on the server: what a page's own limits stop, a request to its API does not."""

import math

from ...errors import InstructLiteError

MAX_PROMPT, MAX_SYSTEM, MAX_TURNS = 8_000, 4_000, 20  # characters, characters, exchanges
MAX_NEW_TOKENS = 1024


def text(given: object, what: str, longest: int, *, empty: bool = False) -> str:
    given = "" if given is None else given  # an untouched field
    if not isinstance(given, str):
        raise InstructLiteError(f"{what} is no text")
    given = given.encode("utf-8", "replace").decode().replace("\0", "")  # halves of characters go into no file
    if len(given) > longest:
        raise InstructLiteError(f"{what} has {len(given):,} characters, at most {longest:,} are taken (shorten it)")
    if not given.strip() and not empty:
        raise InstructLiteError(f"{what} is empty")
    return given.strip()


def number(given: object, what: str, low: float, high: float) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given) or not low <= given <= high:
        raise InstructLiteError(f"{what} is {str(given)[:40]}, expected a number from {low:g} to {high:g}")
    return given


def whole(given: object, what: str, low: int, high: int) -> int:
    return int(number(given, what, low, high))
