"""What items are called and what they are: their ids, titles and attributes as they were written, by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from recsys.features.texts import Texts
from recsys.types import Int64, Item

_NAMES = ("ids", "titles", "documents")


class ItemTexts:
    """One writer beside many readers."""

    def __init__(self) -> None:
        self.ids, self.titles, self.documents = Texts(), Texts(), Texts()

    @property
    def num_bytes(self) -> int:
        """What the texts take."""
        return self.ids.num_bytes + self.titles.num_bytes + self.documents.num_bytes

    def write(self, row: int, item: Item) -> None:
        """The item's texts, at a row or at the one behind the last."""
        # The id, too: a row restored from a file may hold the key of one item and the id of the one before.
        for texts, text in (
            (self.titles, item.title),
            (self.documents, orjson.dumps(dict(item.attributes))),
            (self.ids, item.item_id),
        ):
            if row == len(texts):
                texts.append(text)
            else:
                texts[row] = text

    def empty(self, row: int) -> None:
        """No item has the row any more."""
        for texts in (self.ids, self.titles, self.documents):
            texts[row] = ""

    def state(self, size: int, rows: Int64 | slice) -> dict[str, Any]:
        """`rows` of the first `size`, as arrays."""
        arrays: dict[str, Any] = {}
        for name in _NAMES:
            arrays[f"{name}.starts"], arrays[f"{name}.buffer"] = getattr(self, name).state(size, rows)
        return arrays

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        for name in _NAMES:
            getattr(self, name).restore(arrays[f"{name}.starts"], arrays[f"{name}.buffer"])
