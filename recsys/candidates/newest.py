"""The source `newest`: fills a list that nothing else fills."""

from __future__ import annotations

from recsys.candidates.base import Asked, Listing, Parts, Source, unscored


class NewestSource(Source):
    """Asked where nothing is known yet, or all that is known was excluded."""

    name = "newest"

    def __init__(self, parts: Parts) -> None:
        self._catalogue = parts.catalogue

    def candidates(self, asked: Asked, quota: int) -> Listing:
        return unscored(self._catalogue.newest(quota + len(asked.left_out), asked.allowed))
