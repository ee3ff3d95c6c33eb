"""The source `caller`: the candidates that the request brings itself."""

from __future__ import annotations

from recsys.candidates.base import Asked, Listing, Reason, Source, unscored
from recsys.retrieval.select import NO_ROWS


class CallerSource(Source):
    """Where a request brings candidates, no other source is asked."""

    name = "caller"

    def candidates(self, asked: Asked, quota: int) -> Listing:
        return unscored(NO_ROWS if asked.listed is None else asked.listed)

    def reason(self, asked: Asked) -> Reason:
        return Reason(55, "one of the given candidates")
