"""The source `nearest`: what lies nearest to the user by the two towers."""

from __future__ import annotations

from recsys.candidates.base import NOTHING, Asked, Listing, Reason, Source


class NearestSource(Source):
    """Searches the generation that the user was located in."""

    name = "nearest"
    prior = 3.0
    needs_user = True

    def candidates(self, asked: Asked, quota: int) -> Listing:
        if asked.located is None or asked.deadline.passed(self.name):
            return NOTHING
        return asked.located.search(quota, asked.left_out, asked.allowed)

    def reason(self, asked: Asked) -> Reason | None:
        if asked.user is None or not len(asked.user.history_keys):
            return None
        return Reason(70, "close to what you chose")
