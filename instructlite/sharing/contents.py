"""What of a run or an adapter goes out: by allow-list, without this machine's paths, and scanned for secrets.

Checkpoints, optimizer states, data, answers and votes are on no list. The copies that go out differ from the files here only where
these name paths of this machine; `instructlite.json` is written for the copies, so that they verify where they are loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token

from ..config import EMBEDDED, EMBEDDED_HUB_ID
from ..errors import InstructLiteError
from ..models.manifest import ADAPTER_CONFIG, Adapter, Manifest, adapters_in, is_adapter, sha256_file
from ..models.manifest import NAME as MANIFEST

WEIGHTS = "adapter_model.safetensors"
TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
}  # fmt: skip
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json"}
REPORT = ("report.json", "report.md", "report.html")
RUN, RECIPE, CARD = "run.json", "recipe.yaml", "README.md"
OWN = {WEIGHTS, ADAPTER_CONFIG, MANIFEST, RUN, RECIPE, CARD, *TOKENIZER, *REPORT}
"""Names that a repository has from here: what of them a new push lacks is deleted there."""

SECRETS = {
    "a Hugging Face token": ((b"hf_", b"api_org_"), rb"\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}"),
    "an API key": ((b"sk-", b"AIza"), rb"\bsk-(?:ant-|proj-|or-)?[A-Za-z0-9_]{20,}|\bAIza[0-9A-Za-z_-]{35}"),
    "a GitHub token": (
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
        rb"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    ),
    "an AWS key": ((b"AKIA", b"ASIA"), rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a Slack token": ((b"xox",), rb"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "a private key": ((b"-----BEGIN",), rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
}
"""What it is: how it begins, which is looked for first (weights are large), and the pattern."""
_SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)$")
_BLOCK, _OVERLAP = 1 << 24, 1 << 10
_ABSOLUTE = re.compile(r"(/|~/|[A-Za-z]:[\\/]|\\\\)[^\s/\\]+[/\\]")


@dataclass
class Contents:
    """Files by their path in the repository. `adapters`: by folder, "" is the root: the run's last policy, or else its first reward model.
    `notes`: what the user should know."""

    adapters: dict[str, Adapter]
    base: str
    """Id on the Hub."""
    directory: Path
    """The run, or the adapter."""
    files: dict[str, bytes | Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in sorted(self.files.items())}

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file as it goes out; empty if it is not among the files."""
        return json.loads(self.files[name]) if name in self.files else {}


def gather(source: str | os.PathLike | Adapter, base_model: str | None) -> Contents:
    """The adapters of a run directory, or one adapter, ready to go out; without card and report.

    Raises InstructLiteError if there is none, if one was changed since it was written, and if the base is known by a path only.
    """
    directory = source.path if isinstance(source, Adapter) else Path(source)
    if is_adapter(directory):
        adapters = {"": Adapter.load(directory)}
    else:
        adapters = adapters_in(directory)
        if not adapters:
            raise InstructLiteError(
                f"{directory}: neither a run nor an adapter; give the directory that instructlite run wrote, or a stage's"
            )
        policies = [adapter for adapter in adapters.values() if adapter.role == "policy"]
        adapters = {"": policies[-1] if policies else next(iter(adapters.values())), **adapters}
    bases = {adapter.manifest.fingerprint for adapter in adapters.values()}
    if len(bases) > 1:
        raise InstructLiteError(f"{directory}: its adapters belong to {len(bases)} different bases; push them one by one")
    base = hub_base(adapters[""], base_model)
    contents = Contents(adapters, base, directory)
    for folder, adapter in adapters.items():
        contents.files |= {_join(folder, name): data for name, data in _adapter_files(adapter, base).items()}
    if (directory / RECIPE).is_file():
        recipe = yaml.safe_load((directory / RECIPE).read_text(encoding="utf-8"))
        recipe = without_paths({**recipe, "model": base if recipe.get("model") != EMBEDDED else EMBEDDED})
        contents.files[RECIPE] = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    return contents


def hub_base(adapter: Adapter, given: str | None) -> str:
    """Under which id others find the base."""
    base = adapter.base_id
    if given or base == EMBEDDED:
        return given or EMBEDDED_HUB_ID
    if _ABSOLUTE.match(base) or Path(base).exists() or base.count("/") != 1:
        raise InstructLiteError(f"{adapter}: its base is a directory here ({base}); say where others find it: base_model (--base-model) ID")
    return base


def _adapter_files(adapter: Adapter, base: str) -> dict[str, bytes | Path]:
    """Everything that goes out of one adapter directory, and of an ensemble's other members below it."""
    path, manifest = adapter.path, adapter.manifest
    for name, expected in manifest.files.items():
        if not (path / name).is_file() or sha256_file(path / name) != expected:
            raise InstructLiteError(f"{path / name}: missing or changed since training; restore it or train the stage again")
    files: dict[str, bytes | Path] = {name: path / name for name in manifest.files if name == WEIGHTS or name in TOKENIZER}
    config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    files[ADAPTER_CONFIG] = _json(config | {"base_model_name_or_path": base, "revision": manifest.revision})
    hashes = {name: sha256_file(data) if isinstance(data, Path) else _sha256(data) for name, data in files.items()}
    members = {}
    for member in adapter.members[1:]:
        below = _adapter_files(member, base)
        members[member.path.name] = _sha256(below[MANIFEST])
        files |= {f"{member.path.name}/{name}": data for name, data in below.items()}
    files[MANIFEST] = _json(asdict(_published(manifest, base, hashes, members)))
    if (path / RUN).is_file():
        files[RUN] = _json(without_paths(json.loads((path / RUN).read_text(encoding="utf-8"))))
    return files


def _published(manifest: Manifest, base: str, hashes: dict[str, str], members: dict[str, str]) -> Manifest:
    kept = EMBEDDED if manifest.base == EMBEDDED else base  # the embedded copy has rounded weights, hence a fingerprint of its own
    return replace(manifest, base=kept, files=dict(sorted(hashes.items())), members=members)


def without_paths(value: Any) -> Any:
    """Plain data with every text that is a path of this machine cut to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and (_ABSOLUTE.match(value) or ("/" in value and os.path.exists(value))):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


# --- the scan ---------------------------------------------------------------------------------------------------------------


def scan(files: dict[str, bytes | Path], directory: Path) -> None:
    """Raise InstructLiteError if a secret, or a path of this machine, is in what would go out. Says which file, never what."""
    own, paths = _own_secrets(), _own_paths(directory)
    found = [f"{name}: {what}" for name, data in sorted(files.items()) for what in _findings(name, data, own, paths)]
    if found:
        raise InstructLiteError("nothing was pushed, for this must not go out:\n" + "\n".join(found))


def _findings(name: str, data: bytes | Path, own: dict[str, bytes], paths: dict[str, bytes]) -> list[str]:
    private = {} if name.rpartition("/")[2] in {WEIGHTS, *VOCABULARIES} else paths  # those hold "/root" and the like as tokens
    found = set()
    for block in _blocks(data):
        for what, (openings, pattern) in SECRETS.items():
            if any(opening in block for opening in openings) and re.search(pattern, block):
                found.add(f"what looks like {what}")
        found |= {f"the value of {what}" for what, secret in own.items() if secret in block}
        found |= {f"a path of this machine ({what})" for what, path in private.items() if path in block}
    return sorted(found)


def _blocks(data: bytes | Path) -> Iterator[bytes]:
    """The content in blocks that overlap: what lies across an edge is whole in one of them."""
    if isinstance(data, bytes):
        yield data
        return
    with data.open("rb") as file:
        tail = b""
        while block := file.read(_BLOCK):
            yield tail + block
            tail = block[-_OVERLAP:]


def _own_secrets() -> dict[str, bytes]:
    """Values that must never go out, whatever they look like, by where they come from."""
    named = {f"the environment variable {name}": value for name, value in os.environ.items() if _SECRET_NAMES.search(name)}
    named["your Hugging Face login"] = get_token() or ""
    return {name: value.encode() for name, value in named.items() if len(value) >= 8}


def _own_paths(directory: Path) -> dict[str, bytes]:
    paths = {"your home directory": Path.home(), "the working directory": Path.cwd(), "the directory that is pushed": directory.resolve()}
    return {name: f"{path}/".encode() for name, path in paths.items() if len(path.parts) > 1}


def redacted(text: str) -> str:
    """Text for an error message, without anything that looks like a secret or is one."""
    data = text.encode()
    for secret in _own_secrets().values():
        data = data.replace(secret, b"[...]")
    for _, pattern in SECRETS.values():
        data = re.sub(pattern, b"[...]", data)
    return data.decode()


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
