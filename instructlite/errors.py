"""What a user's mistake gets: one line that says what, where and what to do.

The command line prints it without a traceback and exits with code 2.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class InstructLiteError(Exception):
    """A mistake the user can mend: the message names the place, the fault and the remedy."""

    exit_code = 2


class BadRecords(InstructLiteError):
    """A data file has faults; nothing was trained. `problems` lists them all, `file:line: what` each."""

    LISTED = 20

    def __init__(self, problems: list[str]):
        self.problems = problems
        more = len(problems) - self.LISTED
        super().__init__("\n".join(problems[: self.LISTED] + ([f"+{more} more"] if more > 0 else [])))


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one line which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise InstructLiteError(f"{module} is not installed: pip install 'instructlite[{extra}]'") from error


def find_function(option: str, path: str) -> Callable[..., Any] | None:
    """The function that "module:function" names, None if the module has none; modules of the working directory are found too, as with
    `python -m`. Raises InstructLiteError, with the option, for a module that is not there."""
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name, None) if module and name else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InstructLiteError(f"{option}={path}: no module {error.name} here or among the installed ones") from error
    return function if callable(function) else None
