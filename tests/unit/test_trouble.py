"""What makes a process not ready: a gap at once, anything else once it lasts."""

from __future__ import annotations

from recsys.errors import LogTruncated, LogUnavailable
from recsys.streams.base import STUCK_S
from services.common.trouble import Troubles


def test_a_gap_counts_at_once_and_an_absent_broker_once_it_lasts() -> None:
    now_s = [100.0]
    troubles = Troubles(lambda: now_s[0])
    troubles.note("state", LogUnavailable("the broker is away"))
    assert troubles.lasting(("items", "state")) == "" and troubles.of("state") == "the broker is away"
    now_s[0] += STUCK_S + 1
    troubles.note("state", LogUnavailable("the broker is away still"))
    assert troubles.lasting(("items", "state")) == "the broker is away still (for 4 s)"
    troubles.turned("state")
    assert troubles.lasting(("items", "state")) == "" == troubles.of("state")
    troubles.note("items", LogTruncated("another log: --accept-gap"))
    assert troubles.lasting(("items", "state")) == "another log: --accept-gap"


def test_a_loop_that_waits_without_an_error_counts_once_it_lasts() -> None:
    now_s = [100.0]
    troubles = Troubles(lambda: now_s[0])
    troubles.turned("state")
    now_s[0] += STUCK_S - 1
    assert troubles.lasting(("items", "state")) == ""
    now_s[0] += 2
    assert troubles.lasting(("items", "state")).startswith("state: nothing of it was finished")
    assert "(for 4 s)" in troubles.lasting(("items", "state"))
    troubles.turned("state")
    assert troubles.lasting(("items", "state")) == ""
