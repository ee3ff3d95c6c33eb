"""What bandit policies lose to the best answer, on a simulated stream whose best answers are known, and what they cost.

All policies answer the same requests in lockstep; a click is the same coin for all of them. Lost is the expected clicks that
the best candidate of the request would have brought beyond the chosen one (regret).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from load_tests.bandit_costs import costs, inflation, speed
from load_tests.bandit_loop import loop_choose, loop_update
from load_tests.chart import line_chart
from load_tests.common import RESULTS, ROOT, Report, choose_parts, run, say
from recsys.bandit.base import Choices, Events, Policy, Requests
from recsys.bandit.policy import EdgeValues, PolicyOptions, Shape, make_policy
from recsys.bandit.sums import EdgeSums
from recsys.config import BanditConfig
from recsys.evaluation.bootstrap import interval
from recsys.testing.bandit_world import BanditWorld, BanditWorldOptions

Floats = npt.NDArray[np.float64]

PARTS = ("worlds", "judged", "costs", "loop")
DELAYED = ("epsilon_greedy", "diag_linucb", "diag_linucb_drawn")
DELAYS = {"1_s": 1, "1_min": 60, "45_min": 2700}
HALF_LIFE_S = 7200.0
"""That of the world's drift: every policy over sums, full LinUCB too, forgets as fast."""
DIAG = PolicyOptions(policy="diag_linucb", alpha=0.4, prior=0.3, pool=1, half_life_s=HALF_LIFE_S)
LOOP = BanditConfig()
"""What the loop does where nobody says otherwise."""
POLICIES = {
    "uniform": PolicyOptions(policy="uniform", pool=0),
    "greedy": PolicyOptions(policy="greedy", pool=1, half_life_s=HALF_LIFE_S),
    "epsilon_greedy": PolicyOptions(policy="epsilon_greedy", epsilon=0.05, pool=0, half_life_s=HALF_LIFE_S),
    "thompson": PolicyOptions(policy="thompson", alpha=0.1, prior=0.1, pool=1, half_life_s=HALF_LIFE_S),
    "diag_linucb": DIAG,
    "diag_linucb_drawn": replace(DIAG, pool=5),
    "diag_linucb_fresh": replace(DIAG, prior=0.0, alpha=0.02),
    "diag_linucb_default": replace(DIAG, alpha=LOOP.alpha, prior=LOOP.prior, fresh_above=LOOP.fresh_above),
    "diag_linucb_published": replace(DIAG, prior=0.1, alpha=0.1, published=True),
    "linucb": PolicyOptions(policy="linucb", alpha=0.1, prior=0.1, pool=1, half_life_s=HALF_LIFE_S),
    "square_cb": PolicyOptions(policy="square_cb", gamma=300.0, pool=10, half_life_s=HALF_LIFE_S),
    "neural": PolicyOptions(policy="neural", gamma=1000.0, pool=10),
}
"""α, prior, ε and γ are each policy's best of `GRID` in worlds of other seeds (`--choose`)."""
_WIDTHS = [{"alpha": alpha, "prior": prior} for prior in (0.1, 0.3, 1.0) for alpha in (0.1, 0.2, 0.4)]
"""Diag-LinUCB's and full LinUCB's alike."""
GRID: dict[str, list[dict[str, float]]] = {
    "epsilon_greedy": [{"epsilon": value} for value in (0.02, 0.05, 0.1)],
    "thompson": [{"alpha": value} for value in (0.05, 0.1, 0.2)],
    "diag_linucb": _WIDTHS,
    "diag_linucb_fresh": [{"alpha": value} for value in (0.02, 0.05, 0.1)],
    "diag_linucb_default": [
        {"alpha": alpha, "fresh_above": above} for above in (0.0, 0.5, 0.75) for alpha in (0.02, 0.05, 0.1, 0.3)
    ],
    "diag_linucb_published": [{"alpha": alpha, "prior": prior} for prior in (0.0, 0.1) for alpha in (0.05, 0.1, 0.2)],
    "linucb": _WIDTHS,
    "square_cb": [{"gamma": value} for value in (300.0, 1000.0, 3000.0)],
    "neural": [{"gamma": value} for value in (100.0, 300.0, 1000.0)],
}
CHOOSING_SEEDS = (1000, 1001)
JUDGED = ("linucb", "diag_linucb", "diag_linucb_fresh", "diag_linucb_default")
"""Compared over more worlds than all policies are, an hour each: worlds differ by more than these do."""
JUDGED_S = 3600
FRESH_IMPRESSIONS, FRESH_S = (10, 100), 3600
"""A fresh item counts as tried once shown so often, within so long."""
RESAMPLES = 10_000
STRIDE = 20
"""Minutes of one point of the chart."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=3, help="worlds of all policies, of seeds from --seed on")
    parser.add_argument("--judged", type=int, default=10, help="worlds of Diag-LinUCB and LinUCB, likewise")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="of `worlds`")
    parser.add_argument("--duration", type=int, default=7200, help="seconds of event time of each of --runs")
    choose_parts(parser, PARTS)
    parser.add_argument("--choose", action="store_true", help="print each policy's loss over its grid, in other worlds")


class OverMeans:
    """SquareCB over the normalised means of edges of its own, as it would stand over a ranker's predictions."""

    def __init__(self, policy: Policy, options: PolicyOptions, num_edges: int) -> None:
        self._policy = policy
        self._means = EdgeValues(EdgeSums(num_edges, options.half_life_s), options, explore=False)
        self._rng = np.random.default_rng(0)

    def choose(self, requests: Requests) -> Choices:
        return self._policy.choose(replace(requests, scores=self._means.of(requests, self._rng)[0]))

    def update(self, events: Events) -> None:
        self._means.learn(events)


@dataclass(slots=True)
class Runner:
    """One policy in one world."""

    policy: Policy
    delay_s: int
    """From an answer to when the policy has its reward, and its impression too unless `shown_at_once`."""
    shown_at_once: bool
    lost: list[float] = field(default_factory=list)
    """Regret a request, by minute."""
    impressions: list[Any] = field(default_factory=list)
    """Items shown in each second."""
    waiting: dict[int, list[Events]] = field(default_factory=dict)

    def answer(self, world: BanditWorld, requests: Requests, truth: Floats, coins: Floats) -> float:
        """Learn what is due, answer a second's requests, and look how much was lost a request."""
        now = world.now_s
        for events in self.waiting.pop(now, ()):
            self.policy.update(events)
        drawn = self.policy.choose(requests).drawn
        self.impressions.append(requests.items[drawn])
        shown = world.events(requests, drawn, coins < truth[drawn])
        nothing = np.zeros(len(drawn), np.float32)
        if self.shown_at_once:
            self._later(now + 1, replace(shown, rewards=nothing))
            self._later(now + self.delay_s, replace(shown, impressions=nothing))
        else:
            self._later(now + self.delay_s, shown)
        return float((np.maximum.reduceat(truth, requests.starts[:-1]) - truth[drawn]).mean())

    def _later(self, at_s: int, events: Events) -> None:
        self.waiting.setdefault(at_s, []).append(events)


def runner(world: BanditWorld, name: str, options: PolicyOptions, delay_s: int = 1, at_once: bool = False) -> Runner:
    """A policy that knows nothing yet."""
    o = world.options
    shape = Shape(num_edges=world.num_edges, num_items=world.num_items, num_clusters=o.clusters, hidden=o.hidden)
    policy = make_policy(options, shape, np.random.default_rng(sum(name.encode())))
    if options.policy == "square_cb":
        policy = OverMeans(policy, options, world.num_edges)
    return Runner(policy, delay_s, at_once)


def simulate(world: BanditWorld, runners: dict[str, Runner], seed: int) -> None:
    """Run the world to its end; each runner keeps what it lost."""
    coins = np.random.default_rng([seed, 1])
    minute: dict[str, list[float]] = {name: [] for name in runners}
    while world.now_s < world.options.duration_s:
        requests, truth = world.step()
        tossed = coins.random(world.options.rate)
        for name, one in runners.items():
            minute[name].append(one.answer(world, requests, truth, tossed))
            if len(minute[name]) == 60:
                one.lost.append(float(np.mean(minute[name])))
                minute[name].clear()


def tried(one: Runner, world: BanditWorld, impressions: int) -> float:
    """Share of the items that came at least `FRESH_S` before the end and were shown so often within `FRESH_S`."""
    o = world.options
    shown = np.array(one.impressions)
    reached = []
    for number in range(1, int((o.duration_s - FRESH_S) / o.arrival_s) + 1):
        came = int(number * o.arrival_s)
        mine = shown[came - 1 : came - 1 + FRESH_S] == o.living + number - 1
        reached.append(mine.sum() >= impressions)
    return float(np.mean(reached)) if reached else float("nan")


def cases(world: BanditWorld, policies: Sequence[str]) -> dict[str, Runner]:
    """These policies with feedback a second old, and what delays do to some."""
    found = {name: runner(world, name, POLICIES[name]) for name in policies}
    for name in set(DELAYED) & set(policies):
        for label, delay_s in DELAYS.items():
            if delay_s > 1:
                found[f"{name}_{label}"] = runner(world, name, POLICIES[name], delay_s)
    for label, delay_s in DELAYS.items():
        if delay_s > 1 and "diag_linucb" in policies:
            found[f"diag_linucb_shown_at_once_{label}"] = runner(world, "diag_linucb", DIAG, delay_s, at_once=True)
    return found


def measure(options: argparse.Namespace, report: Report) -> None:
    """Regret of each case over all worlds, then costs and the inflation of the published mean."""
    report.keep()
    if "worlds" in options.parts:
        _worlds(options, report)
    if "judged" in options.parts:
        _judged(options, report)
    if "costs" in options.parts:
        say("costs")
        costs(report, POLICIES, BanditWorldOptions(rate=100), options.seed)
        speed(report)
        inflation(report, options.seed)
    if "loop" in options.parts:
        say("the loop's own path")
        loop_choose(report)
        loop_update(report)


def _worlds(options: argparse.Namespace, report: Report) -> None:
    lost: dict[str, list[list[float]]] = {}
    fresh: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(options.seed, options.seed + options.runs):
        say(f"world {seed}")
        world = BanditWorld(seed, BanditWorldOptions(duration_s=options.duration))
        runners = cases(world, options.policies)
        simulate(world, runners, seed)
        for name, one in runners.items():
            lost.setdefault(name, []).append(one.lost)
            fresh.setdefault(name, []).append(tuple(tried(one, world, n) for n in FRESH_IMPRESSIONS))
        del runners
    for name, several in lost.items():
        whole = np.mean(several, axis=0)
        report.add(f"regret_{name}", float(whole.mean()), "clicks/request")
        if name in POLICIES:
            for n, share in zip(FRESH_IMPRESSIONS, np.mean(fresh[name], axis=0), strict=True):
                report.add(f"fresh_shown_{n}_{name}", float(share), "share", "higher")
            for start in range(0, len(whole), STRIDE):
                upto = start + len(whole[start : start + STRIDE])
                report.add(f"lost_{name}_minute_{upto}", float(whole[start:upto].mean()), "clicks/request")


def _judged(options: argparse.Namespace, report: Report) -> None:
    """What is lost as a ratio to full LinUCB's, over all worlds, with an interval by bootstrap over them."""
    worlds: dict[str, list[float]] = {name: [] for name in JUDGED}
    for seed in range(options.seed, options.seed + options.judged):
        say(f"judged in world {seed}")
        world = BanditWorld(seed, BanditWorldOptions(duration_s=JUDGED_S))
        runners = {name: runner(world, name, POLICIES[name]) for name in JUDGED}
        simulate(world, runners, seed)
        for name, one in runners.items():
            worlds[name].append(float(np.mean(one.lost)))
        del runners
    lost = {name: np.array(several) for name, several in worlds.items()}
    full = lost.pop("linucb")
    drawn = np.random.default_rng(0).integers(len(full), size=(RESAMPLES, len(full)))
    for name, ours in lost.items():
        figure = "regret_vs_linucb" if name == "diag_linucb" else f"{name}_vs_linucb"
        low, high = interval(ours[drawn].mean(1) / full[drawn].mean(1)) or (np.nan, np.nan)
        report.add(figure, float(ours.mean() / full.mean()), "ratio")
        report.add(f"{figure}_low", low, "ratio")
        report.add(f"{figure}_high", high, "ratio")
    single = lost["diag_linucb"] / full
    report.add("regret_vs_linucb_least_of_worlds", float(single.min()), "ratio")
    report.add("regret_vs_linucb_most_of_worlds", float(single.max()), "ratio")


def chart() -> str:
    """Lost clicks over time, of the committed result."""
    result = json.loads((RESULTS / "bandit.json").read_text(encoding="utf-8"))
    series: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
    for row in result["results"]:
        if row["name"].startswith("lost_"):
            name, _, minute = row["name"].removeprefix("lost_").rpartition("_minute_")
            series[name].append((float(minute), row["value"]))
    title = "Clicks lost to the best answer, a request"
    return line_chart(title, f"minutes; each point is the mean of the {STRIDE} before", "", series, log_x=False)


def choose_numbers() -> None:
    """Print what each policy loses over its grid, in worlds that are not reported."""
    lost: dict[str, list[float]] = {}
    for seed in CHOOSING_SEEDS:
        world = BanditWorld(seed, BanditWorldOptions(duration_s=3600))
        runners = {
            f"{name} {numbers}": runner(world, name, replace(POLICIES[name], **numbers))  # type: ignore[arg-type]
            for name, several in GRID.items()
            for numbers in several
        }
        simulate(world, runners, seed)
        for name, one in runners.items():
            lost.setdefault(name, []).append(float(np.mean(one.lost)))
    for name, several in lost.items():
        print(f"{np.mean(several):.4f} {name}")


def main() -> int:
    """The load test; with --choose only the choice of each policy's number."""
    if "--choose" in sys.argv:
        choose_numbers()
        return 0
    status = run("bandit", measure, arguments)
    if "--save" in sys.argv:
        (ROOT / "docs" / "bandit_regret.svg").write_text(chart(), encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
