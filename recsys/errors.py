"""The errors an operator can meet, and what to do about each.

RecsysError
├── ConfigError          the configuration is wrong: fix the named field
├── BadInput             a caller's message or file is wrong: fix the named field
│   └── RecordTooLarge   a record is larger than a log takes: split it
├── LogError
│   ├── LogTruncated     a saved position is not in the log, or in another one: `--accept-gap`, or restore the log
│   ├── LogFull          the spool or disk is full: free space, or bring the broker back
│   └── LogUnavailable   the broker cannot be reached: it is retried; check its address
├── StateUnavailable     the user-state store cannot be reached: answers are context-only until it is back
├── TableFull            a table without `spare` is at its declared capacity: raise it, or give the layout `spare`
├── SnapshotCorrupt      a file is torn or flipped: an older snapshot is used; delete the named file
├── SchemaMismatch       features written by another slot list: restart both processes with one configuration
├── Fenced               a newer trainer took over: this one stops itself
├── FolderLocked         another process uses the data folder: stop it, or choose another `data_dir`
└── ParametersUnavailable  the parameter service cannot be reached: last known rows are used
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_LONGEST_NAME = 64
_SECRETS = re.compile(r"""(?<=://)[^\s'"]*@|(?<=password=)[^&\s'"]+""")


def masked(text: str) -> str:
    """A text that may be printed: without the user names and passwords of the URLs in it."""
    return _SECRETS.sub(lambda found: "***@" if found.group().endswith("@") else "***", text)


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that is most like `name`, for a message; "" where none is known.

    A stranger chooses `name`, and likeness takes time with the square of its length: only its beginning is looked at.
    """
    found = difflib.get_close_matches(str(name)[:_LONGEST_NAME], sorted(known), n=1, cutoff=0.0)
    return found[0] if found else ""


class RecsysError(Exception):
    """Base of all errors that this project raises on purpose. The message names the thing, the value and the remedy."""


class ConfigError(RecsysError):
    """The configuration is wrong."""


class BadInput(RecsysError):
    """A message or a file from outside is wrong; `field` names where."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class RecordTooLarge(BadInput):
    """A record is larger than a log takes."""


class CatalogueFull(BadInput):
    """There is no room for another item: delete some, or raise `capacity.memory_bytes`. Items that are there can be changed."""


class LogError(RecsysError):
    """The event log failed."""


class LogTruncated(LogError):
    """A saved position lies before the log's beginning or beyond its end, or belongs to another log."""


class LogFull(LogError):
    """Nothing more can be accepted."""


class LogUnavailable(LogError):
    """The broker cannot be reached."""


class StateUnavailable(RecsysError):
    """The user-state store cannot be reached."""


class TableFull(RecsysError):
    """The embedding table is at its declared capacity."""


class SnapshotCorrupt(RecsysError):
    """A snapshot or checkpoint file is torn or flipped."""


class SchemaMismatch(RecsysError):
    """Features or parameters of another slot list."""


class Fenced(RecsysError):
    """A newer trainer took over."""


class FolderLocked(RecsysError):
    """Another process uses the data folder."""


class ParametersUnavailable(RecsysError):
    """The parameter service cannot be reached."""


class StepFailed(RecsysError):
    """A step of the trainer raised: its state is to be thrown away. `suspects` are what the step was busy with, likeliest first;
    `others` would have raised in it, too."""

    def __init__(self, message: str, suspects: Sequence[str] = (), others: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.suspects, self.others = tuple(suspects), tuple(others)


class Stopped(RecsysError):
    """Told to stop in the middle of work that a restart does again."""
