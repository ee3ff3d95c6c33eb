"""Why an item is shown, in one short sentence."""

from __future__ import annotations

from collections.abc import Sequence

from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema

_PLAIN = {
    "pinned": "placed here",
    "caller": "one of the given candidates",
    "covisited": "often chosen with what you chose",
    "following": "often chosen next",
    "trending": "popular now",
    "followed": "like what you chose",
    "bandit": "worth a try for users like you",
}
"""What a source says by itself, the most specific first; an item of none of these was the newest."""


class Reasons:
    """Explains shown items from their sources and from what the user's recent history shares with them."""

    def __init__(self, schema: Schema, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._fields = [name for name, _ in schema.item_fields[1 : schema.num_history_fields]]

    def of(self, row: int, sources: Sequence[str], user: UserFeatures | None, last_title: str) -> str:
        """The most specific true reason; `user` None: no source and no ranker needed to know them."""
        if "covisited" in sources and last_title:
            return f"often chosen with “{last_title}”"
        if user is not None and (shared := self._shared(row, user)):
            return f"you recently chose {shared}"
        if "nearest" in sources and user is not None and len(user.history_keys):
            return "close to what you chose"
        return next((reason for source, reason in _PLAIN.items() if source in sources), "new")

    def _shared(self, row: int, user: UserFeatures) -> str:
        """The newest history event's attribute value that this item has, too."""
        if not len(user.history_keys):
            return ""
        for name in self._fields:
            where = self._catalogue.columns(name)
            item = set(self._catalogue.keys[row, where][self._catalogue.mask[row, where]].tolist())
            for keys, mask in zip(user.history_keys[:5, where], user.history_mask[:5, where], strict=True):
                for key in keys[mask].tolist():
                    if key in item and (label := self._catalogue.labels.get(name, key)) is not None:
                        return f"{name} {label}"
        return ""
