"""`recsys evaluate compare`: two configurations over the same events."""

from __future__ import annotations

import argparse
import difflib
import tempfile
from pathlib import Path
from typing import Any

from recsys.errors import BadInput
from recsys.evaluation.compare import Comparison, verdict
from recsys.events import event_files
from services.cli.main import DONE, MISSED, emit
from services.cli.progress import progress_bar
from services.cli.replay_command import prepared


def run(options: argparse.Namespace) -> int:
    """Replay both side by side with progress on stderr; what differs, on stdout."""
    if not event_files.count_rows(options.events)["item"]:
        raise BadInput("no prediction to compare: no event file has items: name one that has", field="events")
    seen: dict[tuple[Path, ...], event_files.Names] = {}
    (first, replay), (second, _) = (
        prepared(argparse.Namespace(**{**vars(options), "config": path}), seen)
        for path in (options.first, options.second)
    )
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(first, second, replay, Path(folder))
        metric = _metric(options.metric, comparison.metrics)
        with progress_bar("compare") as progress:
            result = comparison.run(event_files.merged(options.events), progress)
    found = verdict(result["paired"], metric)
    names = {"a": str(options.first), "b": str(options.second)}
    met = not options.expect or found == "better" or (options.expect == "not_worse" and found == "undecided")
    result |= {"configurations": names, "metric": metric, "verdict": found, "expected": options.expect, "met": met}
    emit(options, result, _text(result))
    return DONE if met else MISSED


def _metric(given: str | None, known: list[str]) -> str:
    if given is None:
        return known[0]
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1, cutoff=0.0)[0]
        raise BadInput(
            f"--metric: {given!r} is not known here: did you mean {near!r}? Known: {', '.join(known)}", field="metric"
        )
    return given


def _text(result: dict[str, Any]) -> str:
    paired = result["paired"]
    lines = [f"a: {result['configurations']['a']}", f"b: {result['configurations']['b']}"]
    lines.append(f"{'':28}{'a':>12}{'b':>12}{'b - a':>12}{'95% interval':>26}")
    for task, values in paired.get("tasks", {"": paired}).items():
        count = values.get("examples", values.get("predictions"))
        lines.append(f"{task or 'next item'}: {count:,} of {values['users']:,} users")
        lines += [f"  {name:26}{_row(value)}" for name, value in values.items() if isinstance(value, dict)]
    if result["unpaired"]:
        lines.append(f"left out, because only one of them has it: {result['unpaired']:,}")
    lines.append(f"by {result['metric']}, b is {result['verdict']}")
    if result["expected"]:
        lines.append(f"expected {result['expected']}: {'met' if result['met'] else 'missed'}")
    return "\n".join(lines)


def _row(value: dict[str, Any]) -> str:
    numbers = "".join("           –" if value[n] is None else f"{value[n]:12.5g}" for n in ("a", "b", "difference"))
    bounds = value.get("difference_ci")
    return numbers + f"{'–' if bounds is None else f'[{bounds[0]:.5g}, {bounds[1]:.5g}]':>26}"
