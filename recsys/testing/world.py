"""A generated world whose right answers are known: titled items of kinds, users who like some of them, true click rates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from recsys.types import Item

Float64 = npt.NDArray[np.float64]


class World:
    """Users and items with known click probabilities.

    The logit of a click is `bias` + the user's taste for the item's kind + the item's own quality. Tastes are normal with
    standard deviation `taste`, qualities with `quality`: a ranker that knew both could not do better than `probability`.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        num_users: int = 200,
        num_items: int = 500,
        num_kinds: int = 20,
        bias: float = -1.5,
        taste: float = 1.5,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.users = [f"user-{n}" for n in range(num_users)]
        self.kind_of = rng.integers(num_kinds, size=num_items)
        self._taste = rng.normal(0.0, taste, (num_users, num_kinds))
        self._quality = rng.normal(0.0, 0.5, num_items)
        self._bias = bias
        self._rng = rng
        self._index = {f"item-{n}": n for n in range(num_items)}

    def items(self) -> list[Item]:
        """The catalogue: attribute `category` is the kind, `tags` say a little about the quality."""
        return [
            Item(
                item_id=item_id,
                title=f"Kind {self.kind_of[n]} no. {n}",
                attributes={"category": f"kind-{self.kind_of[n]}", "tags": [f"grade-{round(self._quality[n] * 2)}"]},
            )
            for item_id, n in self._index.items()
        ]

    def probability(self, user: int, item_ids: Sequence[str]) -> Float64:
        """True click probabilities [K] of a user's items: the best possible score."""
        items = np.array([self._index[i] for i in item_ids], np.intp)
        logit = self._bias + self._taste[user, self.kind_of[items]] + self._quality[items]
        probability: Float64 = 1.0 / (1.0 + np.exp(-logit))
        return probability

    def clicks(self, user: int, item_ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether the user clicks each [K]; drawn anew at each call."""
        return self._rng.random(len(item_ids)) < self.probability(user, item_ids)

    def any_user(self) -> int:
        """A user at random."""
        return int(self._rng.integers(len(self.users)))
