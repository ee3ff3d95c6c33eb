"""The source `bandit`: what is best, or least known, among the clusters nearest to the user."""

from __future__ import annotations

from recsys.candidates.base import NOTHING, Asked, Listing, Reason, Source


class BanditSource(Source):
    """Asks the explorer of the generation that the user was located in."""

    name = "bandit"
    prior = 3.0
    needs_user = True

    def candidates(self, asked: Asked, quota: int) -> Listing:
        if asked.bandit is None or asked.active is None or asked.deadline.passed(self.name):
            return NOTHING
        return asked.bandit.candidates(
            asked.active, quota, asked.request_id, asked.now_ms, asked.left_out, asked.allowed
        )

    def reason(self, asked: Asked) -> Reason:
        return Reason(30, "worth a try for users like you")
