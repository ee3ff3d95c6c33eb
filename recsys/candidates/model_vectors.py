"""What the sources ask of the model: vectors by the towers, rows of the table, and what the trainer tells of its clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from recsys.bandit.graph import Published
from recsys.features.build import UserFeatures
from recsys.model.plan import Block
from recsys.model.tower_scoring import Towers
from recsys.types import Bool, Float32, Int64


class Vectors(Protocol):
    """Thread-safe. Where the parameter service is away, answers are made of the rows last known."""

    @property
    def dense_version(self) -> int:
        """Version of the dense weights in use; 0: untrained."""
        ...

    @property
    def towers(self) -> Towers:
        """The towers in use."""
        ...

    @property
    def clusters(self) -> Published | None:
        """What the trainer last told of the bandit's clusters."""
        ...

    def rows(self, block: Block) -> Float32:
        """The values of a block's rows [U, D]."""
        ...

    def user_vector(self, user: UserFeatures, towers: Towers) -> Float32 | None:
        """The user's vector [tower_dim] (of several interests [K, tower_dim]); None before anything is known of them."""
        ...

    def user_vectors(self, users: Sequence[UserFeatures], towers: Towers) -> Float32:
        """Vectors [n, tower_dim] (or [n, K, tower_dim]) of users of whom something is known."""
        ...

    def item_vectors(self, keys: Int64, mask: Bool, towers: Towers) -> Float32:
        """Item tower over item columns [n, I]: vectors [n, tower_dim]."""
        ...
