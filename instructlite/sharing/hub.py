"""push_to_hub(): an adapter, or a whole run, as one repository and in one commit: all of it arrives, or nothing.

The token comes from the environment (HF_TOKEN) or from `hf auth login`, never from an argument: it would end up in files and logs.
A push that fails can be repeated: what is there already is not sent again, and where nothing changed there is no new commit.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
import markupsafe
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..errors import InstructLiteError
from ..evaluation.markdown import escape
from ..evaluation.report import Report
from ..models.manifest import NAME as MANIFEST
from ..models.manifest import Adapter
from .card import model_card
from .contents import CARD, OWN, REPORT, RUN, Contents, gather, redacted, scan

TRIES, LONGEST_WAIT = 5, 60.0
first_wait = 1.0  # seconds; doubled after each try
TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # 409 and 412: somebody else's commit came between

Result = TypeVar("Result")


class HubError(InstructLiteError):
    """The Hub refused, or could not be reached; everything here is as it was."""

    exit_code = 3


@dataclass(frozen=True)
class Push:
    """What went to the Hub, or in a dry run would go. `print` it for the list of files."""

    repo_id: str
    private: bool
    sizes: dict[str, int]
    """Bytes of each file."""
    card: str
    notes: list[str]
    url: str | None = None
    commit: str | None = None
    """None: it was a dry run."""
    changed: bool = False
    """Whether the commit is a new one."""
    collection: str | None = None
    """URL of the one it is in now."""

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def __str__(self) -> str:
        width = max(map(len, self.sizes))
        files = [f"  {name:{width}}  {_size(size):>9}" for name, size in self.sizes.items()]
        whose = "private" if self.private else "public"
        return "\n".join([f"{self.repo_id} ({whose}): {len(self.sizes)} files, {_size(self.total)}", *files, *self.notes])


def push_to_hub(
    source: str | os.PathLike | Adapter,
    repo_id: str,
    *,
    private: bool = True,
    report: Report | str | os.PathLike | None = None,
    base_model: str | None = None,
    license: str | None = None,
    collection: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Push an adapter, or a run directory with all of its adapters, to `repo_id` ("user/name").

    A run becomes one repository with a folder for each adapter (sft/, dpo/, ppo-ptx/, ppo/, reward/, judge/) and the last policy at the
    root. private: False publishes; a repository that is public already is refused while this is True. report: what `evaluate` gave or its
    directory; None: the run's own, if it is about these adapters. base_model: where others find the base, if it is a directory here.
    license: of the adapters, as the Hub writes it ("apache-2.0"). collection: title of one of the owner's collections, made if there is
    none, that gets the repository, as it may those of the other stages. dry_run: nothing is sent, no network is needed.

    Raises InstructLiteError, before anything is sent, for what cannot go out (a secret, a path of this machine, a damaged adapter), and
    HubError if the Hub refuses or is not to be reached after several tries.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InstructLiteError(f"{repo_id}: no name for a repository ({error})") from error
    if repo_id.count("/") != 1:
        raise InstructLiteError(f"{repo_id}: say whose repository it is, such as me/{repo_id}")
    contents = gather(source, base_model)
    found = _with_report(contents, report)
    card = model_card(contents, repo_id, found, license)
    contents.files[CARD] = card.encode()
    scan(contents.files, contents.directory)
    push = Push(repo_id, private, contents.sizes, card, contents.notes)
    if dry_run:
        return push
    push = _send(push, contents)
    return push if collection is None else _collected(push, collection, contents)


def _with_report(contents: Contents, given: Report | str | os.PathLike | None) -> Report | None:
    """Put the report among the files, and give it as they have it."""
    own = contents.directory / "report"
    if isinstance(given, Report):
        content = given.to_dict()
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        files = {"report.json": text, "report.md": given.to_markdown(), "report.html": given.to_html()}
        report = Report(**{name: value for name, value in content.items() if name != "format"}, answers=[])
    else:
        directory = own if given is None else Path(given)
        directory = directory.parent if directory.is_file() else directory
        if given is None and not (own / "report.json").is_file():
            contents.notes.append('There is no report: the card says "not evaluated" (--report DIRECTORY gives one).')
            return None
        report = Report.load(directory)
        files = {name: (directory / name).read_text(encoding="utf-8") for name in REPORT if (directory / name).is_file()}
    about = {row["adapter"] for row in [*report.candidates, *report.judges]}
    if contents.adapters[""].sha256 not in about:
        wrong = f"the report is not about this adapter ({contents.adapters[''].sha256[:12]}), but about one before it"
        if given is not None:
            raise InstructLiteError(f"{wrong}; write it anew with instructlite evaluate")
        contents.notes.append(f"Left out, and not in the card: {wrong}.")
        return None
    base = report.base["id"]
    for name, text in files.items():
        contents.files[f"report/{name}"] = _renamed(text, base, contents.base).encode()
    return Report(**{**vars(report), "base": report.base | {"id": contents.base}})


def _renamed(text: str, base: str, public: str) -> str:
    """The report with the base's public id in place of a directory here."""
    if "/" not in base:
        return text
    written = {form(base): form(public) for form in (str, escape, markupsafe.escape)}  # in JSON, Markdown and HTML
    return re.sub("|".join(map(re.escape, written)), lambda found: written[found[0]], text)


# --- the Hub ----------------------------------------------------------------------------------------------------------------


def _send(push: Push, contents: Contents) -> Push:
    """Create the repository if there is none, and commit what differs."""
    api = HfApi(library_name="instructlite")
    if get_token() is None:
        raise HubError(f"{push.repo_id}: you are not logged in; set HF_TOKEN, or run: hf auth login")
    _patiently(push, lambda: api.create_repo(push.repo_id, private=push.private, exist_ok=True))
    info = _patiently(push, lambda: api.model_info(push.repo_id))
    if push.private and not info.private:
        raise HubError(f"{push.repo_id}: exists and is public; push to it with private=False (--public), or to another repository")
    before = {file.rfilename for file in info.siblings or []}
    stale = sorted(name for name in before - set(contents.files) if _is_ours(name, before))

    def commit() -> str:  # operations are made anew each time: those of a failed commit cannot be used again
        operations = [CommitOperationAdd(name, data if isinstance(data, bytes) else str(data)) for name, data in contents.files.items()]
        deletions = [CommitOperationDelete(name) for name in stale]
        return api.create_commit(push.repo_id, [*operations, *deletions], commit_message="Push with InstructLite").oid

    oid = _patiently(push, commit)
    return Push(**{**vars(push), "url": f"{api.endpoint}/{push.repo_id}", "commit": oid, "changed": oid != info.sha})


def _collected(push: Push, title: str, contents: Contents) -> Push:
    """Put the repository into a collection, once."""
    api, owner = HfApi(library_name="instructlite"), push.repo_id.partition("/")[0]
    found = _patiently(push, lambda: api.create_collection(title, namespace=owner, private=push.private, exists_ok=True))
    note = f"{contents.json(RUN).get('recipe', contents.adapters[''].role)}, LoRA of {contents.base}"
    _patiently(push, lambda: api.add_collection_item(found.slug, push.repo_id, "model", note=note, exists_ok=True))
    return Push(**{**vars(push), "collection": found.url})


def _is_ours(name: str, there: set[str]) -> bool:
    """Whether a push put it there: at the root, with the report, or with an adapter in a folder."""
    *folders, last = name.split("/")
    return last in OWN and (not folders or folders[0] == "report" or f"{folders[0]}/{MANIFEST}" in there)


def _patiently(push: Push, call: Callable[[], Result]) -> Result:
    """Call until it succeeds or fails for good: what may pass (429, 5xx, a cut connection) is tried again, later and later."""
    wait = first_wait
    for tries_left in reversed(range(TRIES)):
        try:
            return call()
        except OfflineModeIsEnabled as error:
            raise HubError(f"{push.repo_id}: offline mode is on; unset HF_HUB_OFFLINE to push") from error
        except (HfHubHTTPError, httpx2.TransportError, RuntimeError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) else error  # of uploads in threads
            if not isinstance(cause, (HfHubHTTPError, httpx2.TransportError, ValueError)):
                raise
            if not _may_pass(cause) or not tries_left:
                raise HubError(_explained(push, cause)) from error
            time.sleep(min(_asked_to_wait(cause) or wait, LONGEST_WAIT))
            wait *= 2
    raise AssertionError("the last try returns or raises")


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    return status in TRANSIENT if status else isinstance(error, httpx2.TransportError)


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _asked_to_wait(error: BaseException) -> float | None:
    after = error.response.headers.get("Retry-After", "") if _status(error) else ""
    return float(after) if after.isdigit() else None


def _explained(push: Push, error: BaseException) -> str:
    status, said = _status(error), redacted(" ".join(str(error).split()))[:300]
    token = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of your login"
    if status == 401:
        return f"{push.repo_id}: the Hub does not accept {token} (401); log in anew: hf auth login"
    if status == 403:
        return f"{push.repo_id}: {token} may not write there (403); give it write access at https://huggingface.co/settings/tokens"
    if status is None and not isinstance(error, httpx2.TransportError):
        return f"{push.repo_id}: the Hub refused: {said}"
    what = f"answers {status}" if status else "cannot be reached"
    again = "; nothing was published half, repeat the same command to go on" if _may_pass(error) else ""
    return f"{push.repo_id}: the Hub {what} ({said}){again}"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
