"""What a row on a device has beside its values: optimiser state, when it was last seen and changed, and how often it was used."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys.table.cuda_index import Chunks, power
from recsys.table.rows import LAST_SEEN_STEP_MS, last_seen
from recsys.table.worth import HALF_LIFE

_MARKS = 3
"""Numbers of a record behind the state: last-seen in steps, the version that the row was changed in, and its level of uses."""


class RowRecords:
    """Records of 32-bit numbers by row, the state's first. Nothing waits for the device."""

    def __init__(self, total: int, width: int, device: torch.device, chunk_rows: int) -> None:
        """`total` rows with `width` numbers of state."""
        self.width = width
        record = width + _MARKS
        record = power(record) if record <= 8 else -(-record // 8) * 8  # a sector of memory, or whole ones
        self.chunks = Chunks(total, record, torch.int32, device, chunk_rows)

    def state(self, rows: Tensor) -> Tensor:
        """Optimiser state [N, S]."""
        return self.chunks.gather(rows, 0, self.width).view(torch.float32)

    def seen_ms(self, rows: Tensor) -> Tensor:
        """When the rows were last seen [N]."""
        return self.chunks.gather(rows, self.width, 1)[:, 0].to(torch.int64) * LAST_SEEN_STEP_MS

    def uses(self, rows: Tensor) -> Tensor:
        """Levels of how often the rows were seen [N]."""
        return self.chunks.gather(rows, self.width + 2, 1)[:, 0]

    def worth(self, rows: Tensor) -> Tensor:
        """What the rows are worth [N]: `worth.py`."""
        return self.chunks.gather(rows, self.width, 1)[:, 0].to(torch.int64) + HALF_LIFE * self.uses(rows).to(
            torch.int64
        )

    def changed(self, rows: Tensor) -> Tensor:
        """The version [N] that the rows were changed in."""
        return self.chunks.gather(rows, self.width + 1, 1)[:, 0]

    def put(self, rows: Tensor, state: Tensor) -> None:
        """Set the state of unique rows; those below 0 are skipped."""
        self.chunks.scatter(rows, state.contiguous().view(torch.int32))

    def put_uses(self, rows: Tensor, levels: Tensor) -> None:
        """Set how often unique rows were seen."""
        self.chunks.scatter(rows, levels[:, None], self.width + 2)

    def seen_and_uses(self, rows: Tensor) -> tuple[list[int], list[int]]:
        """When rows were last seen, in steps, and how often. Waits for the device."""
        seen, levels = self.chunks.gather(rows, self.width, 3)[:, [0, 2]].split(1, 1)
        return seen[:, 0].tolist(), levels[:, 0].tolist()

    def mark(self, rows: Tensor, seen_ms: Tensor, version: int, uses: Tensor) -> None:
        """Set when unique rows were last seen and how often, and the version they were changed in."""
        seen = (last_seen(seen_ms) // LAST_SEEN_STEP_MS).to(torch.int32)
        marks = torch.stack([seen, torch.full_like(seen, version), uses.to(torch.int32)], 1)
        self.chunks.scatter(rows, marks, self.width)


def stamp(now_ms: int, version: int) -> int:
    """Version (>= 1) and time as the kernels take them; never below 2^32, which would be another type."""
    return version << 32 | (int(last_seen(now_ms)) // LAST_SEEN_STEP_MS & 0xFFFFFFFF)
