"""A request's candidates: every source asked, their lists merged, without what rules leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.candidates.base import Asked, Reason
from recsys.candidates.caller import CallerSource
from recsys.candidates.explorer import Active, Bandit
from recsys.candidates.generation import Generations, Located
from recsys.candidates.mix import Found, Showable, mix
from recsys.candidates.newest import NewestSource
from recsys.candidates.pinned import PinnedSource
from recsys.candidates.sources import Sources
from recsys.features.build import UserFeatures
from recsys.retrieval.select import among
from recsys.types import Float32, Int32, Int64

MIX_LIMIT = 500
"""Most candidates that are scored: the budget of scoring (6 ms) holds for this many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Catalogue rows [K], the best as mixed first, and which of the sources `names` brought each: bit i of a mask is `names[i]`'s."""

    rows: Int32
    scores: Float32
    """The sources' own, see `mix`."""
    names: tuple[str, ...]
    masks: Int64

    def sources(self, candidate: int) -> tuple[str, ...]:
        """The sources that brought a candidate."""
        mask = int(self.masks[candidate])
        return tuple(name for bit, name in enumerate(self.names) if mask >> bit & 1)

    def take(self, places: npt.NDArray[np.intp]) -> Candidates:
        """These candidates only."""
        return Candidates(
            rows=self.rows[places], scores=self.scores[places], names=self.names, masks=self.masks[places]
        )


class Finder:
    """Asks the sources. Thread-safe."""

    def __init__(self, sources: Sources, generations: Generations | None, bandit: Bandit | None) -> None:
        self._sources, self._generations, self.bandit = sources, generations, bandit
        self._catalogue = sources.catalogue
        quotas = sources.config.retrieval.sources
        self.needs_user = any(sources.by_name[name].needs_user for name in quotas)
        """Whether a source asks for what is known of the user."""
        self._priors = {name: one.prior for name, one in sources.by_name.items() if one.prior is not None}

    def place(self, user: UserFeatures) -> tuple[Located | None, Active | None]:
        """Where the user is in the generation in use, and the clusters nearest to them."""
        located = None if self._generations is None else self._generations.locate(user)
        if located is None or self.bandit is None:
            return located, None
        return located, self.bandit.activate(located.generation.name, user, located.vector)

    def find(self, asked: Asked) -> Candidates:
        """Up to `MIX_LIMIT` candidates, and what is pinned."""
        quotas = self._sources.quotas_at(asked.now_ms)
        if asked.listed is not None:
            found = [self._listing(CallerSource.name, asked, len(asked.listed))]
        else:
            found = [self._listing(name, asked, quota) for name, quota in quotas.items()]
        alive = self._catalogue.alive
        may = Showable(alive, alive if asked.allowed is None else asked.allowed, asked.left_out)
        rows, scores, masks = mix(found, MIX_LIMIT, self._priors, may, quotas)
        if len(rows) < asked.n and asked.listed is None:
            # Nothing is known yet, or all that is known was excluded: the newest items fill the list.
            name, newest, theirs = self._listing(NewestSource.name, asked, asked.n)
            new = ~np.isin(newest, rows)
            found.append((name, newest[new], theirs[new]))
            rows, scores, masks = mix(found, MIX_LIMIT, self._priors, may, {**quotas, name: asked.n - len(rows)})
        names = tuple(name for name, _, _ in found)
        return self._with_pinned(Candidates(rows=rows, scores=scores, names=names, masks=masks), asked, may)

    def _listing(self, name: str, asked: Asked, quota: int) -> Found:
        return name, *self._sources.by_name[name].candidates(asked, quota)

    def _with_pinned(self, found: Candidates, asked: Asked, may: Showable) -> Candidates:
        """Pinned items that the rules allow are candidates, too; the caller's own list is not added to."""
        if not asked.pinned:
            return found
        _, rows, _ = self._listing(PinnedSource.name, asked, len(asked.pinned))
        rows = rows[among(rows, may.allowed, may.left_out)]
        rows = rows[may.alive[rows]]
        if asked.listed is not None:
            rows = rows[np.isin(rows, found.rows)]
        more = rows[~np.isin(rows, found.rows)]
        every = np.concatenate([found.rows, more])
        bits = np.isin(every, rows).astype(np.int64) << len(found.names)
        return Candidates(
            rows=every,
            scores=np.concatenate([found.scores, np.zeros(len(more), np.float32)]),
            names=(*found.names, PinnedSource.name),
            masks=np.concatenate([found.masks, np.zeros(len(more), np.int64)]) | bits,
        )

    def generation(self, asked: Asked) -> str:
        """The generation that was searched: another may be in use by now."""
        if asked.located is not None:
            return asked.located.generation.name
        return self._generations.name if self._generations else ""

    def served(self, asked: Asked, rows: Int32) -> bytes:
        """What an impression of the items at `rows` says of the bandit."""
        if asked.bandit is None or asked.active is None:
            return b""
        return asked.bandit.served(asked.active, rows)

    def reasons(self, asked: Asked, names: Sequence[str]) -> dict[str, Reason]:
        """What each of these sources shows its items for."""
        told = {name: self._sources.by_name[name].reason(asked) for name in names}
        return {name: reason for name, reason in told.items() if reason is not None}
