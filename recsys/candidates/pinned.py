"""The source `pinned`: items with a place of their own, of the request or of the configuration."""

from __future__ import annotations

import numpy as np

from recsys.candidates.base import Asked, Listing, Reason, Source, unscored


class PinnedSource(Source):
    """They need not be among what the other sources bring."""

    name = "pinned"

    def candidates(self, asked: Asked, quota: int) -> Listing:
        return unscored(np.array(list(asked.pinned.values()), np.int32))

    def reason(self, asked: Asked) -> Reason:
        return Reason(60, "placed here")
