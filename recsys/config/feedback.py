"""What types of feedback mean beside the tasks' labels, and how much of one user's counts."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import Field

from recsys.config.tasks import Section


class FeedbackConfig(Section):
    """What types of feedback mean, and how much of one user's counts."""

    negative: tuple[str, ...] = ("dislike",)
    """Types that say no: they count for nothing, and the item is left out as one of the history is (`ranking.exclude`)."""
    hide: tuple[str, ...] = ("hide", "not_interested")
    """Types after which the item is never shown to the user again, whatever `ranking.exclude` says."""

    user_limit: int = Field(3, ge=1, le=255)
    """So often within an hour one user's feedback on one item, and showing it to them, counts for trending, co-visits and rates."""

    def check(self, counted: Collection[str]) -> None:
        """ValueError when a type says both yes and no."""
        for name in ("negative", "hide"):
            if both := sorted({*getattr(self, name)} & {*counted}):
                raise ValueError(
                    f"feedback.{name}: {both[0]!r} is one of retrieval.count_types, too: take it out of one of them"
                )
