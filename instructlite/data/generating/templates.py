"""The prompts that generating and judging are made of: YAML files in prompts/ that one can read, copy and change."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from ...errors import InstructLiteError
from .completer import Messages

FOLDER = Path(__file__).parent / "prompts"
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Prompts:
    """One file: its templates by name, whatever else stands in it, and the hash by which rows name it."""

    path: Path
    templates: dict[str, str]
    others: dict[str, Any]
    sha256: str

    def message(self, name: str, **values: str) -> Messages:
        """The template filled in, as one message of the user. What is filled in is not looked through for placeholders."""
        return [{"role": "user", "content": Template(self.templates[name]).substitute(values).strip()}]


def read_prompts(name: str, path: str | Path | None = None) -> Prompts:
    """The file that comes with the package, or one of the user's in its place: the same templates, no unknown placeholder.

    Raises InstructLiteError with the file and the template.
    """
    shipped = _read(FOLDER / f"{name}.yaml")
    if path is None:
        return shipped
    own = _read(Path(path))
    for template, text in shipped.templates.items():
        if template not in own.templates:
            raise InstructLiteError(f"{path}: '{template}' is missing or no text (templates of {name}: {', '.join(shipped.templates)})")
        known = re.findall(r"\$(\w+)", text)
        try:
            Template(own.templates[template]).substitute(dict.fromkeys(known, ""))
        except KeyError as error:
            raise InstructLiteError(f"{path}: '{template}' asks for ${error.args[0]}; known: ${', $'.join(dict.fromkeys(known))}") from None
        except ValueError as error:
            raise InstructLiteError(f"{path}: '{template}': {error} (a dollar sign of its own is written $$)") from None
    return own


def transcript(messages: Messages) -> str:
    """A conversation as text, for a model that reads about it."""
    return "\n\n".join(f"{_SPEAKERS[message['role']]}: {message['content']}" for message in messages)


def _read(path: Path) -> Prompts:
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise InstructLiteError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InstructLiteError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InstructLiteError(f"{path}: expected named prompts (name: text)")
    templates = {name: value for name, value in content.items() if isinstance(value, str)}
    others = {name: value for name, value in content.items() if name not in templates}
    return Prompts(path, templates, others, hashlib.sha256(text.encode()).hexdigest())
