"""Rows for ranking, wherever they come from; the last known ones while the parameter service is away."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from recsys.errors import ParametersUnavailable, TableFull
from recsys.model.plan import Block
from recsys.parameters.base import Parameters, ParameterState
from recsys.table.base import Layout
from recsys.table.tables import Tables
from recsys.types import Float32

KNOWN_ROWS = 200_000
"""Rows kept for when parameter is away: 200k × 18 floats is 15 MB; half forgets popular items' neighbours sooner."""
REMEMBER_EVERY = 8
"""Of a layout's replies one in so many is kept: popular rows come in every reply; keeping all of them costs .8 ms a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Rows [N, D] of each block, in order, and what they are of."""

    values: Sequence[Float32]
    state: ParameterState
    available: bool
    """Whether the parameter service keeps them up to date; else they are the last known ones."""


class RowSource:
    """Rows of these layouts by way of `parameters`. Thread-safe."""

    def __init__(self, layouts: Sequence[Layout], parameters: Parameters) -> None:
        self._parameters = parameters
        self._layouts = [replace(layout, capacity=KNOWN_ROWS) for layout in layouts]
        self._known = Tables(self._layouts, "cpu")
        self._replies: Counter[str] = Counter()
        self._remembering = threading.Lock()
        """A table has one writer: of two requests at once one remembers."""
        self.state = ParameterState()
        """Of the newest reply."""

    def lookup(self, blocks: Sequence[Block]) -> Found:
        """The blocks' rows, from wherever they can be had."""
        try:
            reply = self._parameters.lookup(blocks)
            self._check_widths(blocks, reply.values)
        except ParametersUnavailable:
            return Found(values=[self._last_known(block) for block in blocks], state=self.state, available=False)
        self.state = reply.state
        # A reply says no width where there is no row.
        values = [
            rows if len(block.keys) else self._last_known(block)
            for block, rows in zip(blocks, reply.values, strict=True)
        ]
        self._remember(blocks, values)
        return Found(values=values, state=reply.state, available=reply.current)

    def require(self, blocks: Sequence[Block]) -> Found:
        """The blocks' rows as they are now. Raises ParametersUnavailable when they are not to be had."""
        found = self.lookup(blocks)
        if not found.available:
            raise ParametersUnavailable("the parameter service did not answer")
        return found

    def poll(self) -> ParameterState:
        """The state of now, without rows. Raises ParametersUnavailable."""
        self.state = self._parameters.lookup([]).state
        return self.state

    def dense(self) -> tuple[int, bytes]:
        """The newest dense weights: (dense_version, safetensors buffer). Raises ParametersUnavailable."""
        return self._parameters.dense()

    def _last_known(self, block: Block) -> Float32:
        return self._known[block.layout].lookup(block.slots, block.keys)[0]

    def _check_widths(self, blocks: Sequence[Block], values: Sequence[Float32]) -> None:
        for block, rows in zip(blocks, values, strict=True):
            dim = self._known[block.layout].layout.dim
            if len(rows) and rows.shape[1] != dim:
                raise ParametersUnavailable(
                    f"rows of {block.layout!r} are {rows.shape[1]} wide, not {dim}: run one release"
                )

    def _remember(self, blocks: Sequence[Block], values: Sequence[Float32]) -> None:
        """Keep some of the rows for when parameter is away; a full store starts anew."""
        if not self._remembering.acquire(blocking=False):
            return
        try:
            for block, rows in zip(blocks, values, strict=True):
                self._replies[block.layout] += 1
                if self._replies[block.layout] % REMEMBER_EVERY == 1:
                    self._known[block.layout].write(block.slots, block.keys, rows, 0)
        except TableFull:
            self._known = Tables(self._layouts, "cpu")
        finally:
            self._remembering.release()
