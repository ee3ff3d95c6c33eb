"""What a chaos run calls untrue health: only what somebody who asked could have seen."""

from __future__ import annotations

import time

from tests.system.chaos_load import Probes


def judged(looked: bool, ranking_up: bool = True) -> list[str]:
    """Processes whose 200 was untrue while a label is ten seconds late; `looked`: an answer asked for since all are ready has it not."""
    probes = Probes({"ranking": "", "trainer": "", "parameter": ""}, "run")
    probes._since["label"] = time.monotonic() - 10
    for name in ("ranking", "trainer", "parameter"):
        probes._judge(name, 200 if ranking_up or name != "ranking" else 0, [], False, "")
    if looked:
        probes._looked_s["label"] = time.monotonic()
    probes._judge("trainer", 200, ["label"], False, "")
    untrue, polls = probes.taken()
    assert polls == 4
    return [each["process"] for each in untrue]


def test_ready_is_untrue_once_an_answer_asked_for_since_lacks_what_was_accepted() -> None:
    assert judged(looked=True) == ["trainer"]


def test_nothing_is_judged_before_somebody_could_ask() -> None:
    assert judged(looked=False) == []
    assert judged(looked=True, ranking_up=False) == []


def test_not_ready_is_untrue_while_all_goes_through_and_says_why() -> None:
    probes = Probes({"ranking": "", "trainer": "", "parameter": ""}, "run")
    probes.during = "kill trainer"
    probes._judge("trainer", 503, [], False, "restoring")
    probes._judge("trainer", 503, [], True, "catching up")
    (untrue,), _ = probes.taken()
    assert (untrue["process"], untrue["why"], untrue["during"]) == ("trainer", "catching up", "kill trainer")


def test_what_comes_through_late_does_not_make_not_ready_untrue() -> None:
    probes = Probes({"ranking": "", "trainer": "", "parameter": ""}, "run")
    probes._through("label", time.monotonic() - probes.through_s - 1, lambda: True)
    probes._through("click", time.monotonic(), lambda: True)
    assert probes._prompt_s.keys() == {"click"} and probes._done_s.keys() == {"label", "click"}
