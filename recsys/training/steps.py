"""What one step reports, and what it is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from recsys.errors import LogError, StepFailed
from recsys.training.opened import Emission
from recsys.types import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A record that could not be used, and why: it was `malformed`, or a step `failed` with it."""

    record: Record
    reason: str
    kind: str = "malformed"


@dataclass(slots=True)
class StepReport:
    """What one step did: for metrics, dead letters and progressive evaluation. Not part of the state."""

    outcomes: dict[str, int] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    emissions: list[Emission] = field(default_factory=list)
    skipped_batches: dict[str, int] = field(default_factory=dict)
    """Batches not learned, by task whose gradient was not finite; `two_tower`: the towers'."""
    rewards: list[str] = field(default_factory=list)
    """What became of each reward of the bandit."""
    expired: int = 0
    ahead: int = 0
    """Records whose times led the wall clock by more than the bound."""
    learned: bool = True
    """The emissions were trained on; else an operator said to skip them."""
    retried: bool = False
    """The step failed before, with what is left out now."""

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def skipped(self, task: str) -> None:
        self.skipped_batches[task] = self.skipped_batches.get(task, 0) + 1


REQUEST, HELD, POSITIVES, EXPLORED = "request/", "held/", "positives", "explored"
"""Units of a step that are no records: an open impression, feedback that waits for one (both by request), the towers' waiting
positives, and what is due to the bandit's edges."""


def place_of(record: Record) -> str:
    """The unit that a record is: "topic/partition/offset"."""
    return f"{record.topic}/{record.partition}/{record.offset}"


def partition_of(record: Record) -> str:
    """ "topic/partition"."""
    return f"{record.topic}/{record.partition}"


def content_of(record: Record) -> str:
    """What a record says, whatever log it lies in."""
    return hashlib.blake2b(
        record.key.encode("utf-8", "surrogatepass") + b"\n" + record.value, digest_size=16
    ).hexdigest()


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300] if not isinstance(error, StepFailed) else str(error)


@contextmanager
def blaming(suspects: Callable[[], Sequence[str]]) -> Iterator[None]:
    """What raises in here raises StepFailed that names the suspects. A full disk is nobody's fault."""
    try:
        yield
    except (OSError, LogError, StepFailed):
        raise
    except Exception as error:
        raise StepFailed(said(error), suspects()) from error
