"""MovieLens in time order: the whole pipeline against popularity and item-kNN, which answer the same requests in the same replay.

A rating of 4 or 5 stars is a click. All three know everything before the request, and leave out what the user has rated. Intervals
are of the paired difference, by bootstrap over users. Chosen on what is before the reported time; the rivals, too, are the best of
their kind there. Needs the data folder (`--data`, described in docs/development.md).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from load_tests.common import ROOT, Report, run, say
from recsys import config
from recsys.clock import iso_ms
from recsys.evaluation.bootstrap import Resamples, interval
from recsys.evaluation.click_log import ClickLog
from recsys.evaluation.measures import NextItem
from recsys.evaluation.replay import Replay
from recsys.evaluation.replayed_loop import Options
from recsys.events import event_files
from recsys.types import Bool, Feedback
from services.cli.convert_command import convert_movielens

START, END = "2000-10-31T00:00:00Z", "2003-03-01T00:00:00Z"
DEV = ("2000-09-01T00:00:00Z", START)
N = 20


class Rivals:
    """Popularity, and item-kNN by cosine (Sarwar et al. 2001) over all that a user liked, both counted as the stream goes."""

    def __init__(self, num_items: int) -> None:
        self.index: dict[str, int] = {}
        self.counts = np.zeros(num_items)
        self.together = np.zeros((num_items, num_items), np.float32)
        self.liked: dict[str, list[int]] = defaultdict(list)
        self.rated: dict[str, list[int]] = defaultdict(list)

    def of(self, item_id: str) -> int:
        return self.index.setdefault(item_id, len(self.index))

    def feedback(self, message: Feedback) -> None:
        """Count one rating."""
        item, liked = self.of(message.item_id), self.liked[message.user_id]
        self.rated[message.user_id].append(item)
        if message.type == "click":
            self.counts[item] += 1
            self.together[item, liked] += 1
            self.together[liked, item] += 1
            liked.append(item)

    def scores(self, user_id: str) -> dict[str, npt.NDArray[np.float64]]:
        """Of every film; what the user has rated never comes first."""
        liked = self.liked[user_id]
        norm = np.sqrt(np.maximum(self.counts, 1.0))
        near = (self.together[liked] / norm[liked][:, None]).sum(0) / norm
        found = {"popularity": self.counts.copy(), "item_knn": near.astype(np.float64)}
        for each in found.values():
            each[self.rated[user_id]] = -1.0
        return found


class Watched(Replay):
    """A replay whose answers the rivals give, too."""

    rivals: Rivals
    user_id = ""

    def step(self, now_ms: int, kind: str, message: Any) -> bool:
        rated = isinstance(message, Feedback) and now_ms < self.loop.options.until_ms
        if rated:
            self.user_id = message.user_id
        goes_on = super().step(now_ms, kind, message)
        if rated:
            self.rivals.feedback(message)
        return goes_on


class Beside(NextItem):
    """Places of the clicked film in our list and in each rival's; 0: it was not shown."""

    def __init__(self, replay: Watched) -> None:
        super().__init__(N)
        self._replay = replay
        self.users: list[int] = []
        self.places: dict[str, list[int]] = defaultdict(list)

    def add(self, shown: list[str], clicked: str, user: int, candidates: Bool) -> None:  # type: ignore[override]
        super().add(shown, clicked, user, candidates)
        self.users.append(user)
        self.places["ours"].append(shown.index(clicked) + 1 if clicked in shown else 0)
        item = self._replay.rivals.of(clicked)
        for name, scores in self._replay.rivals.scores(self._replay.user_id).items():
            place = 1 + int((scores > scores[item]).sum()) + int((scores[:item] == scores[item]).sum())
            self.places[name].append(place if place <= N else 0)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--sample", type=float, default=0.05, help="share of users whose requests are answered")
    parser.add_argument("--dev", action="store_true", help="report the two months before instead: for choosing")
    parser.add_argument("--config", type=Path, default=ROOT / "deploy" / "configs" / "movielens.toml")


def measure(options: argparse.Namespace, report: Report) -> None:
    """One replay, three lists for each request."""
    if not (options.data / "ml1m_ratings.parquet").exists():
        say(f"not measured: {options.data / 'ml1m_ratings.parquet'} is missing")
        return
    begin, end = DEV if options.dev else (START, END)
    chosen = Options(report_from_ms=iso_ms(begin, "from"), until_ms=iso_ms(end, "until"), sample=options.sample)
    with tempfile.TemporaryDirectory(prefix="recsys-movielens-") as folder:
        events = Path(folder) / "events"
        counts = convert_movielens(options.data, events)
        replay = Watched(config.load(options.config), chosen, Path(folder))
        replay.rivals = Rivals(counts["items"])
        assert isinstance(replay.driver, ClickLog)
        replay.driver.next_item = beside = Beside(replay)
        result = replay.run(event_files.merged([events]), lambda done, _: say(f"{done:,} events"))
    report.add("movielens_predictions", float(len(beside.users)), "requests", "higher")
    report.add("movielens_seconds", result["seconds"], "s")
    report.add("movielens_candidate_recall_at_300", result["next_item"]["candidate_recall_at_300"], "recall", "higher")
    drawn = Resamples(np.array(beside.users, np.int64))
    hits = {name: (np.array(places) > 0).astype(np.float64) for name, places in beside.places.items()}
    for name, places in beside.places.items():
        reciprocal = np.array([1 / place if place else 0.0 for place in places])
        report.add(f"movielens_{name}_hit_rate_at_20", float(hits[name].mean()), "hit rate", "higher")
        report.add(f"movielens_{name}_mrr_at_20", float(reciprocal.mean()), "MRR", "higher")
    for name in ("popularity", "item_knn"):
        gain = hits["ours"] - hits[name]
        low = interval(drawn.sums(gain) / drawn.sums(np.ones(len(gain))))
        report.add(f"movielens_gain_over_{name}", float(gain.mean()), "hit rate", "higher")
        report.add(f"movielens_gain_over_{name}_low", low[0] if low else float("nan"))


if __name__ == "__main__":
    sys.exit(run("movielens", measure, arguments))
