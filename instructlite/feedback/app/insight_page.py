"""The page that shows what the votes say so far: `insight()` as tables, each number with its interval."""

import threading
import time

import gradio as gr

from ..ballots import FLAGS
from ..insight import Insight, Row, insight
from ..store import Store
from .frame import Frame
from .markup import bar, escape, status, table

SECONDS_BETWEEN = 20
KEPT_SECONDS = 5
LEAD = "Who wins, how sure that is, how far people agree, and whether the reward models agree with people. Brackets are 95 % intervals."


class Findings:
    """The newest insight, computed at most every few seconds however many look at it."""

    def __init__(self, store: Store):
        self.store = store
        self._lock = threading.Lock()
        self._made, self._page = float("-inf"), ""

    def page(self) -> str:
        with self._lock:
            if time.monotonic() - self._made > KEPT_SECONDS:
                self._page, self._made = shown(insight(self.store.votes())), time.monotonic()
            return self._page


def insight_page(store: Store, frame: Frame) -> gr.Blocks:
    findings = Findings(store)
    with frame.page("/insight", "Insight", LEAD) as page:
        found = gr.HTML(elem_id="insight")
        timer = gr.Timer(SECONDS_BETWEEN)
        frame.on([page.load, timer.tick], findings.page, [], [found])
        gr.HTML(
            '<div class="lead"><p>The votes as training data: <code>instructlite votes export RUN --to comparisons</code> '
            "(or rankings, likert, demonstrations).</p></div>"
        )
    return page


def shown(found: Insight) -> str:
    """The whole page. Names, use cases and groups are text of others, and escaped as such."""
    if not found.votes:
        return status("No votes yet.")
    parts = [_numbers(found), *(_win_rates(found)), _candidates(found), _reward_models(found), _voters(found)]
    return "".join(parts)


def _numbers(found: Insight) -> str:
    agreement, boxes = found.agreement, [(f"{found.votes:,}", "votes"), (f"{len(found.voters):,}", "voters")]
    boxes += [(f"{count:,}", f"not counted: {reason}") for reason, count in found.left_out.items()]
    if agreement["alpha"] is not None:
        boxes.append((_number(agreement, "alpha"), f"Krippendorff's alpha on {agreement['pairs']:,} shared pairs (1 agree, 0 chance)"))
    if agreement["likert_alpha"] is not None:
        boxes.append((_number(agreement, "likert_alpha", "likert_"), "the same of the scores from 1 to 7"))
    if found.gold:
        boxes.append((f"{found.gold['right']:,} of {found.gold['votes']:,}", "gold items judged rightly"))
    if found.first_shown:
        boxes.append((_number(found.first_shown), "the answer shown first won (0.50 but for position bias)"))
    return f'<div class="numbers">{"".join(_box(value, what) for value, what in boxes)}</div>'


def _box(value: str, what: str) -> str:
    number, _, interval = value.partition(" [")
    small = f"<small>[{escape(interval)}</small>" if interval else ""
    return f"<div><b>{escape(number)}</b>{small}<span>{escape(what)}</span></div>"


def _win_rates(found: Insight) -> list[str]:
    tables = []
    for caption, rows, column in (
        ("Win rates", found.win_rates, None),
        ("By use case", found.by_use_case, "use_case"),
        ("By group of voters", found.by_group, "group"),
    ):
        if rows:
            lines = [[*([escape(row[column])] if column else []), escape(f"{row['a']} against {row['b']}"), *_rates(row)] for row in rows]
            head = [*([column.replace("_", " ")] if column else []), "who", "win rate", "", "won", "tied", "lost", "prompts"]
            tables.append(table(caption, head, lines))
    return tables


def _rates(row: Row) -> list[str]:
    return [_number(row), bar(row["rate"], row["low"], row["high"]), *(f"{row[name]:,}" for name in ("wins", "ties", "losses", "prompts"))]


def _candidates(found: Insight) -> str:
    if not any(row["likert"] is not None or row["flags"] for row in found.candidates):
        return ""
    flags = [flag for flag in FLAGS if any(row["flags"].get(flag) for row in found.candidates)]
    lines = [
        [escape(row["candidate"]), f"{row['judged']:,}", _number(row, "likert"), *(_share(row["flags"].get(flag)) for flag in flags)]
        for row in found.candidates
    ]
    return table("Answers", ["who", "judged", "score from 1 to 7", *(FLAGS[flag] for flag in flags)], lines)


def _reward_models(found: Insight) -> str:
    if not found.reward_models:
        return ""
    lines = [
        [escape(row["judge"]), _number(row), bar(row["rate"], row["low"], row["high"]), f"{row['pairs']:,}", f"{row['longer_wins']:.2f}"]
        for row in found.reward_models
    ]
    rates = table("Reward models against people", ["reward model", "orders pairs as people do", "", "pairs", "longer wins"], lines)
    sure = [
        [escape(row["judge"]), f"{each['predicted']:.2f}", f"{each['observed']:.2f}", f"{each['pairs']:,}"]
        for row in found.reward_models
        for each in row["calibration"]
    ]
    return rates + table("How sure they are, and how often they are right", ["reward model", "sure", "right", "pairs"], sure)


def _voters(found: Insight) -> str:
    lines = [
        [escape(row["voter"]), f"{row['votes']:,}", _share(row["agreement"]), f"{row['gold_right']}/{row['gold']}" if row["gold"] else "–",
         _share(row["first_shown"]), _share(row["ties"]), _share(row["seconds"], 0)]
        for row in found.voters[:30]
    ]  # fmt: skip
    return table("Voters", ["voter", "votes", "agreement with others", "gold", "first shown wins", "ties", "seconds a vote"], lines)


def _number(row: Row, name: str = "rate", prefix: str = "") -> str:
    if row[name] is None:
        return "–"
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    return f"{row[name]:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None else "")


def _share(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
