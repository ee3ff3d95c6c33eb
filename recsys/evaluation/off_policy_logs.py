"""Logged choices out of event files, ours as `recsys log export` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from recsys.errors import BadInput
from recsys.evaluation.off_policy import LEAST, Float64, Rounds
from recsys.events import event_files
from recsys.keys import key_of
from recsys.types import Feedback, Impression, Int64, ShownItem

VIEW = "view"
"""Feedback that makes an item of a deferred answer count as shown."""
_SUM_TOLERANCE = 1e-3
"""Logged probabilities are float32 of up to 1,000 items: their sum may be off by this and no more."""

Places = set[tuple[str, str]]
"""Of (request_id, item_id)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What was shown and what it earned: 1 for each item with feedback of the rewarded types, else 0."""

    impressions: Sequence[Impression]
    rewarded: Places
    viewed: Places = field(default_factory=set)
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that are in no round, by reason."""
    types: Mapping[str, int] = field(default_factory=dict)
    """How much feedback of each type there is."""

    def shown(self, impression: Impression, item: ShownItem) -> bool:
        """Whether the user saw it; of a deferred answer, what has a `view`."""
        return impression.activation != "deferred" or (impression.request_id, item.item_id) in self.viewed


def read_log(paths: Sequence[Path], types: Collection[str], window_s: float | None = None) -> Log:
    """The log of event files or their folders; feedback of these types is rewarded where it names its request.

    `window_s`: only feedback so soon after the impression is, and impressions so close to the log's end are left out:
    theirs may still come. A request that is logged again is left out as a `duplicate`; 8 bytes tell it.
    """
    impressions: list[Impression] = []
    rewarded: dict[tuple[str, str], int] = {}
    viewed: Places = set()
    left_out: Counter[str] = Counter()
    known: set[int] = set()
    found: Counter[str] = Counter()
    last_ms = 0
    for last_ms, _, message in event_files.merged(list(paths)):  # noqa: B007
        if isinstance(message, Impression):
            if (key := key_of(message.request_id)) in known:
                left_out["duplicate"] += 1
            else:
                known.add(key)
                impressions.append(replace(message, features=b""))  # most of the bytes, and of no use here
        elif isinstance(message, Feedback):
            found[message.type] += 1
            if message.request_id:
                place = (message.request_id, message.item_id)
                if message.type in types:
                    rewarded.setdefault(place, message.time_ms)
                if message.type == VIEW:
                    viewed.add(place)
            elif message.type in types:
                left_out["feedback_without_request"] += 1
    if window_s is not None:
        ends_ms = {i.request_id: i.time_ms + window_s * 1000 for i in impressions}
        left_out["feedback_after_window"] = sum(t > ends_ms.get(place[0], t) for place, t in rewarded.items())
        left_out["window_open"] = sum(end > last_ms for end in ends_ms.values())
        rewarded = {place: t for place, t in rewarded.items() if t <= ends_ms.get(place[0], t)}
        impressions = [i for i in impressions if ends_ms[i.request_id] <= last_ms]
    if not impressions:
        at_all = f" whose window of {window_s:g} s is over" if left_out["window_open"] else ""
        raise BadInput(f"the log has no impression{at_all}: name files of what was shown, too", field="log")
    return Log(impressions=impressions, rewarded=set(rewarded), viewed=viewed, left_out=left_out, types=found)


def drawn_positions(log: Log) -> list[int]:
    """The positions that were drawn, from the top; BadInput when there is none."""
    found = {item.position for impression in log.impressions for item in impression.items if item.pool is not None}
    if not found:
        shown = log.impressions[0].items[0]
        raise BadInput(f"no position of the log was drawn: {_why_not_drawn(shown)}", field="log")
    return sorted(found)


def drawn_position(log: Log) -> int:
    """The one position that was drawn; BadInput when there is none, or several to choose from."""
    found = drawn_positions(log)
    if len(found) > 1:
        raise BadInput(
            f"positions {', '.join(map(str, found))} were drawn: choose one with --position, or evaluate whole "
            "answers with --estimators slates",
            field="position",
        )
    return found[0]


def rounds_of(log: Log, position: int, *, model_only: bool = False) -> Rounds:
    """The choices of one position. Answers without it, or where it was not seen or not drawn, are left out and counted.

    `model_only`: for dm alone; where the position never was drawn, the items at it and below are its pool.
    BadInput where no answer has the position, or none drew it; where a pool is not whole or contradicts the propensity.
    """
    left_out = Counter(log.left_out)
    choices: list[tuple[Impression, ShownItem]] = []
    for impression in log.impressions:
        found = next((item for item in impression.items if item.position == position), None)
        if found is None:
            left_out["too_short"] += 1
        elif not log.shown(impression, found):
            left_out["not_viewed"] += 1
        else:
            choices.append((impression, found))
    if not choices and left_out["not_viewed"]:
        raise BadInput(
            f"position {position} was viewed in none of {left_out['not_viewed']} deferred answers that have it: log "
            f"feedback of type {VIEW!r} with their request_id, or choose another",
            field="position",
        )
    if not choices:
        raise BadInput(f"no impression shows position {position}: choose one that answers have", field="position")
    drawn = [choice for choice in choices if choice[1].pool is not None]
    if not drawn and not model_only:
        impression, found = choices[0]
        where = f"request {impression.request_id!r}, position {position}"
        raise BadInput(f"{where} was not drawn: {_why_not_drawn(found)}", field="position")
    if drawn:
        left_out["not_drawn"] = len(choices) - len(drawn)
    return build(log, drawn or choices, left_out)


def _why_not_drawn(item: ShownItem) -> str:
    if item.propensity is None:
        state = "the log has no propensities"
    elif item.propensity < 1:
        state = f"propensity {item.propensity} without the pool it was drawn from"
    else:
        state = "it took the best (propensity 1)"
    return (
        f"{state}, which says nothing about any other choice. Still valid: dm, which trusts its model of the reward "
        "(--estimators dm --position N), or an A/B test or interleaving. To weigh, log a drawn position with its pool "
        "(slate.draw_positions)"
    )


def build(log: Log, choices: Iterable[tuple[Impression, ShownItem]], left_out: Counter[str]) -> Rounds:
    """Rounds of some choices; the pool of one that was not drawn is what the answer shows there and below."""
    numbers: dict[str, int] = {}
    users: dict[str, int] = {}
    items: list[int] = []
    logged: list[float] = []
    sizes: list[int] = []
    shown: list[int] = []
    propensities: list[float] = []
    rewards: list[float] = []
    of_user: list[int] = []
    requests: list[str] = []
    values: dict[str, list[tuple[int, float]]] = {}
    for impression, item in choices:
        if item.pool is None:
            pool = tuple((i.item_id, np.nan) for i in impression.items if i.position >= item.position)
        else:
            pool = item.pool
            _check(impression, item)
        seen = {i.item_id: i for i in impression.items}
        for item_id, probability in pool:
            if item_id == item.item_id:
                shown.append(len(items))
                propensities.append(probability)
            if (known := seen.get(item_id)) is not None:
                for name, value in _numbers(known):
                    values.setdefault(name, []).append((len(items), value))
            items.append(numbers.setdefault(item_id, len(numbers)))
            logged.append(probability)
        sizes.append(len(pool))
        rewards.append(float((impression.request_id, item.item_id) in log.rewarded))
        of_user.append(users.setdefault(impression.user_id, len(users)))
        requests.append(impression.request_id)
    return Rounds(
        names=tuple(numbers),
        starts=np.array([0, *accumulate(sizes)], np.int64),
        items=np.array(items, np.int64),
        logged=np.array(logged, np.float64),
        shown=np.array(shown, np.int64),
        propensities=np.array(propensities, np.float64),
        rewards=np.array(rewards, np.float64),
        users=np.array(of_user, np.int64),
        values={name: _column(pairs, len(items)) for name, pairs in values.items()},
        requests=tuple(requests),
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def _numbers(item: ShownItem) -> Iterable[tuple[str, float]]:
    if item.score is not None:
        yield "score", item.score
    yield from item.predictions.items()


def _column(pairs: list[tuple[int, float]], num: int) -> Float64:
    column = np.full(num, np.nan)
    entries: Int64 = np.array([entry for entry, _ in pairs], np.int64)
    column[entries] = [value for _, value in pairs]
    return column


def _check(impression: Impression, item: ShownItem) -> None:
    """Refuse a pool that is not whole or contradicts the propensity."""
    assert item.pool is not None
    where = f"request {impression.request_id!r}, position {item.position}"
    total = sum(probability for _, probability in item.pool)
    if abs(total - 1) > _SUM_TOLERANCE:
        raise BadInput(f"{where}: the pool's probabilities sum to {total:.6g}: log the whole pool", field="pool")
    least = min(probability for _, probability in item.pool)
    if least < LEAST:
        raise BadInput(f"{where}: the pool has probability {least:g}: must be from {LEAST:g} to 1", field="pool")
    chosen = dict(item.pool)[item.item_id]
    if item.propensity is not None and abs(item.propensity - chosen) > _SUM_TOLERANCE * chosen:
        problem = f"propensity {item.propensity} is not the shown item's {chosen} in the pool"
        raise BadInput(f"{where}: {problem}: log both from one draw", field="propensity")
