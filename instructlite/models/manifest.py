"""`instructlite.json` beside every adapter: which base, tokenizer and template it belongs to, and the hash of each file.

PEFT loads an adapter of another base of the same shape, and one with flipped bytes, without a word; this file is what
notices. It holds no secrets and no weights, and reading it needs no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InstructLiteError
from . import fetch

if TYPE_CHECKING:
    from .base import Base

FORMAT = 1
NAME = "instructlite.json"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Manifest:
    """What an adapter directory says of itself.

    `fingerprint` identifies the base's weights whatever the quantization; `score_bias` is the constant added to the
    scalar head of a reward adapter so that demonstrations score 0; `parents` maps a role to the sha256 of the adapter
    weights it came from; `members` names the directories, below this one, of the other members of an ensemble, with the
    sha256 of their own manifests.
    """

    role: str
    base: str
    revision: str | None
    fingerprint: str
    quantization: str
    dtype: str
    tokenizer_sha256: str
    template_sha256: str
    score_bias: float | None = None
    parents: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(
    directory: str | Path, *, role: str, base: Base, score_bias: float | None = None, parents: dict[str, str] | None = None
) -> Manifest:
    """Write `instructlite.json` into a finished adapter directory, with the sha256 of every file that is there."""
    directory = Path(directory)
    files = {path.name: sha256_file(path) for path in sorted(directory.iterdir()) if path.is_file() and path.name != NAME}
    manifest = Manifest(
        role=role,
        base=base.id,
        revision=base.revision,
        fingerprint=base.fingerprint,
        quantization=base.quantization,
        dtype=base.dtype,
        tokenizer_sha256=base.tokenizer_sha256,
        template_sha256=base.template_sha256,
        score_bias=score_bias,
        parents=parents or {},
        files=files,
    )
    (directory / NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: str | Path) -> Manifest:
    path = Path(directory) / NAME
    if not path.is_file():
        raise InstructLiteError(f"{directory}: not an InstructLite adapter ({NAME} is missing); pass a directory that a recipe wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InstructLiteError(f"{path}: damaged ({error}); train the stage again") from error
    if content.get("format") != FORMAT:
        raise InstructLiteError(
            f"{path}: format {content.get('format')}, this version reads format {FORMAT}; use the version that wrote it"
        )
    return Manifest(**content)


def add_members(directory: Path, members: list[Path]) -> None:
    """Copy the other members of an ensemble into the first one's directory, and note them in its manifest."""
    for member in members:
        shutil.copytree(member, directory / member.name, dirs_exist_ok=True)
    noted = {member.name: sha256_file(directory / member.name / NAME) for member in members}
    manifest = replace(read_manifest(directory), members=noted)
    (directory / NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Adapter:
    """Handle of an adapter directory: what a recipe's `run()` returns and every stage after it takes."""

    path: Path
    manifest: Manifest
    reference: str | None = None
    """Of an adapter from the Hub: user/repo, as it was asked for."""

    @classmethod
    def load(cls, path: str | Path | Adapter) -> Adapter:
        """Open a directory, or download user/repo from the Hub (text only; a Path is always one here).

        Raises InstructLiteError if it is not an adapter that InstructLite wrote.
        """
        if isinstance(path, Adapter):
            return path
        if fetch.reference(path):
            directory = fetch.download(path, NAME)
            return cls(directory, read_manifest(directory), path)
        return cls(Path(path), read_manifest(path))

    @property
    def name(self) -> str:
        """What to call it beside others: the last part of where it is."""
        return self.reference.partition("@")[0].rpartition("/")[2] if self.reference else self.path.resolve().name

    @property
    def role(self) -> str:
        return self.manifest.role

    @property
    def base_id(self) -> str:
        return self.manifest.base

    @property
    def sha256(self) -> str:
        """Hash of the adapter's weights, by which its children name it."""
        return self.manifest.files["adapter_model.safetensors"]

    @property
    def members(self) -> list[Adapter]:
        """The adapters of an ensemble, this one first; of any other adapter, only itself."""
        found = [self]
        for name, expected in self.manifest.members.items():
            manifest = self.path / name / NAME
            if not manifest.is_file() or sha256_file(manifest) != expected:
                raise InstructLiteError(f"{manifest}: missing or changed since training; restore the directory or train the ensemble again")
            found.append(Adapter.load(self.path / name))
        return found

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the run that wrote it (`run.json`); empty if there is none."""
        run = self.path / "run.json"
        return json.loads(run.read_text(encoding="utf-8")).get("metrics", {}) if run.is_file() else {}

    def __str__(self) -> str:
        return self.reference or str(self.path)


def is_adapter(path: object) -> bool:
    """Whether it is an adapter, its directory, or (text only) a Hub repository with one."""
    if isinstance(path, Adapter):
        return True
    if not isinstance(path, (str, Path)):
        return False
    return (Path(path) / ADAPTER_CONFIG).is_file() or fetch.holds(path, ADAPTER_CONFIG)


FIRST, LAST = "sft", "ppo"
"""What all policies of a run start from, and the one that a run is about."""


def adapters_in(run: str | Path) -> dict[str, Adapter]:
    """The adapters of a run, or of a repository that it was pushed to, by their folders; empty where there are none.

    In the order of the loop: SFT, other policies by name, PPO, reward models, the judge.
    """
    if found := fetch.reference(run):
        repo, folder, revision = found
        names = [] if folder else fetch.folders(run, NAME)
        adapters = {name: Adapter.load(f"{repo}/{name}" + (f"@{revision}" if revision else "")) for name in names}
    else:
        adapters = {path.parent.name: Adapter.load(path.parent) for path in Path(run).glob(f"*/{ADAPTER_CONFIG}")}

    def place(folder: str) -> tuple:
        is_policy = adapters[folder].role == "policy"
        return not is_policy, folder == (LAST if is_policy else "judge"), folder != FIRST, folder

    return {folder: adapters[folder] for folder in sorted(adapters, key=place)}


def different_names(adapters: Sequence[Adapter | str]) -> list[str]:
    """Their names, or the texts themselves; where two are alike, the second is "sft-2"."""
    names: list[str] = []
    for member in adapters:
        names.append(unused(member.name if isinstance(member, Adapter) else member, names))
    return names


def unused(name: str, taken: Sequence[str]) -> str:
    """The name, or "name-2" where it is taken, and so on."""
    return next(new for number in itertools.count(1) if (new := name if number == 1 else f"{name}-{number}") not in taken)


def member_names(name: str, count: int) -> list[str]:
    """`reward`, or for an ensemble `reward-0`, `reward-1`, ..."""
    return [name] if count == 1 else [f"{name}-{number}" for number in range(count)]


def verify(adapter: Adapter, base: Base) -> None:
    """Refuse a damaged adapter, or one that was trained on another base, tokenizer or chat template."""
    manifest = adapter.manifest
    for name, expected in manifest.files.items():
        path = adapter.path / name
        if not path.is_file():
            raise InstructLiteError(f"{path}: missing, though {NAME} lists it; restore the directory or train the stage again")
        if sha256_file(path) != expected:
            raise InstructLiteError(f"{path}: damaged or changed since training (sha256 differs); restore it or train the stage again")
    for what, ours, theirs in (
        ("base", base.fingerprint, manifest.fingerprint),
        ("tokenizer", base.tokenizer_sha256, manifest.tokenizer_sha256),
        ("chat template", base.template_sha256, manifest.template_sha256),
    ):
        if ours != theirs:
            raise InstructLiteError(
                f"{adapter.path}: trained on another {what} ({manifest.base}) than the one loaded ({base.id}); load its own"
            )
