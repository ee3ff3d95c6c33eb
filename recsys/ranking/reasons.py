"""Why an item is shown, in one short sentence."""

from __future__ import annotations

from collections.abc import Sequence

from recsys.features.build import UserFeatures
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema


class Reasons:
    """Explains shown items from their sources and from what the user's recent history shares with them."""

    def __init__(self, schema: Schema, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._fields = [name for name, _ in schema.item_fields[1 : schema.num_history_fields]]

    def of(self, row: int, sources: Sequence[str], user: UserFeatures, last_title: str) -> str:
        """The most specific true reason."""
        if "covisited" in sources and last_title:
            return f"often chosen with “{last_title}”"
        if shared := self._shared(row, user):
            return f"you recently chose {shared}"
        if "nearest" in sources and len(user.history_keys):
            return "close to what you chose"
        if "caller" in sources:
            return "one of the given candidates"
        return "popular now" if "trending" in sources else "new"

    def _shared(self, row: int, user: UserFeatures) -> str:
        """The newest history event's attribute value that this item has, too."""
        if not len(user.history_keys):
            return ""
        for name in self._fields:
            where = self._catalogue.columns(name)
            item = set(self._catalogue.keys[row, where][self._catalogue.mask[row, where]].tolist())
            for keys, mask in zip(user.history_keys[:5, where], user.history_mask[:5, where], strict=True):
                for key in keys[mask].tolist():
                    if key in item:
                        return f"{name} {self._catalogue.labels[name, key]}"
        return ""
