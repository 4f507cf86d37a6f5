"""Adapters in Hub repositories: `user/repo`, or `user/repo/sft` where they stand in a folder, either with `@revision`.

Only the files that the adapter's own manifest lists are downloaded, all of one commit. Nothing pickled is among them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..errors import InstructLiteError

_WORD = r"\w[\w.-]*"
_REFERENCE = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?P<folder>(/{_WORD})*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_SAFE = re.compile(rf"{_WORD}\.(safetensors|json|jinja|model|txt)", re.ASCII)

RECORD = "run.json"  # what the run says of itself goes with the adapter, but is not what it is verified by


def reference(source: object) -> tuple[str, str, str | None] | None:
    """(repository, "folder/" or "", revision) where `source` is text that names a Hub repository and nothing that is here."""
    found = _REFERENCE.fullmatch(source) if isinstance(source, str) else None
    if found is None or os.path.exists(source):
        return None
    return found["repo"], found["folder"].lstrip("/") + "/" if found["folder"] else "", found["revision"]


def holds(source: object, name: str) -> bool:
    """Whether there is such a file on the Hub, or in the cache of it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    found = reference(source)
    if found is None:
        return False
    repo, folder, revision = found
    try:
        hf_hub_download(repo, folder + name, revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError):
        return False  # a base, then: loading it says what is wrong
    return True


def folders(source: str, name: str) -> list[str]:
    """The folders of a repository that have such a file."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = reference(source)
    try:
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=[f"*/{name}"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError):
        return []  # loading the repository itself says what is wrong
    return sorted(path.parent.name for path in directory.glob(f"*/{name}"))


def download(source: str, manifest: str) -> Path:
    """The directory of an adapter in the Hub's cache, with all files that its manifest (the name of that file) lists."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repo, folder, revision = reference(source)
    try:
        directory = Path(hf_hub_download(repo, folder + manifest, revision=revision)).parent
        commit = directory.parts[len(directory.parts) - 1 - folder.count("/")]
        files = [manifest, RECORD, *_listed(directory, manifest)]
        snapshot_download(repo, revision=commit, allow_patterns=[folder + name for name in files])
        members = json.loads((directory / manifest).read_text(encoding="utf-8")).get("members", {})
        for member in members:
            download(f"{repo}/{folder}{member}@{commit}", manifest)
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise InstructLiteError(f"{source}: neither a directory here nor an InstructLite adapter on the Hub ({why})") from error
    return directory


def _listed(directory: Path, manifest: str) -> list[str]:
    files = list(json.loads((directory / manifest).read_text(encoding="utf-8")).get("files", {}))
    if unsafe := [name for name in files if not _SAFE.fullmatch(name)]:
        raise InstructLiteError(f"{directory / manifest}: lists {unsafe[0]!r}, which is no file of an adapter; do not use this repository")
    return files
