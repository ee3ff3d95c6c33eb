"""Every implementation against the reference: the same calls give the same answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from recsys.errors import TableFull
from recsys.table.base import Pending, Rows, Segment, Table
from recsys.table.cpu import CpuTable
from recsys.table.reference import ReferenceTable
from tests.contract.test_table import DEEP, EXTREMES, PLAIN, WIDE, gone, layout_of, live, pairs
from tests.table_cuda import COMPILED, cuda_table

ADAM = Segment(name="adam", dim=4, optimizer="adam", init_scale=0.01)
FTRL = Segment(name="ftrl", dim=2, optimizer="ftrl", learning_rate=0.2, l1=0.1, l2=0.1)

KEYS = st.lists(st.tuples(st.sampled_from([0, 1, 7]), st.sampled_from([*EXTREMES, *range(10, 20)])), max_size=12)


class TablesAgree(RuleBasedStateMachine):
    """Every verb on an implementation and the oracle: equal answers, bit for bit."""

    make: type[Table] = CpuTable

    @initialize(
        admission=st.sampled_from([1, 2, 3]),
        capacity=st.sampled_from([12, 60]),
        options=st.sampled_from(
            [
                {},
                {"filter_counters": 64},
                {"precision": "float16"},
                {"precision": "bfloat16", "rounding": "stochastic", "filter_counters": 64},
            ]
        ),
        segments=st.sampled_from([(DEEP, WIDE, PLAIN), (ADAM, FTRL)]),
        spare=st.sampled_from([0.0, 0.1, 0.5]),
    )
    def build(
        self, admission: int, capacity: int, options: dict[str, object], segments: tuple[Segment, ...], spare: float
    ) -> None:
        layout = layout_of(admission=admission, capacity=capacity, segments=segments)
        self.layout = replace(layout, spare=spare, order=7, **options)  # type: ignore[arg-type]
        self.both: list[Table] = [type(self).make(self.layout), ReferenceTable(self.layout)]
        self.now_ms = 0
        self.versions: dict[str, int] = {}

    def each(self, verb: str, *args: object) -> list[object]:
        answers = []
        for table in self.both:
            try:
                answers.append(getattr(table, verb)(*args))
            except (TableFull, KeyError) as error:
                answers.append(str(error))
        assert isinstance(answers[0], str) == isinstance(answers[1], str)
        return answers

    @rule(given=KEYS, admit=st.booleans(), pause=st.sampled_from([0, 1000, 8000, 100_000_000]))
    def lookup_train(self, given: list[tuple[int, int]], admit: bool, pause: int) -> None:
        self.now_ms += pause
        first, second = self.each("lookup_train", *pairs(*given), self.now_ms, admit)
        assert np.array_equal(first, second)
        assert not (self.layout.spare and isinstance(first, str)), "a table that makes room never fails to train"

    @rule(rows=st.integers(0, 12))
    def make_room(self, rows: int) -> None:
        before = len(self.both[0])
        first, second = self.each("make_room", rows)
        assert first == second == before - len(self.both[0])
        assert len(self.both[0]) + rows <= self.layout.capacity

    @rule(given=KEYS, seed=st.integers(0, 99))
    def apply_gradients(self, given: list[tuple[int, int]], seed: int) -> None:
        gradients = np.random.default_rng(seed).standard_normal((len(given), 6)).astype(np.float32)
        self.each("apply_gradients", *pairs(*given), gradients, self.now_ms)

    @rule(given=KEYS, seed=st.integers(0, 99))
    def write(self, given: list[tuple[int, int]], seed: int) -> None:
        values = np.random.default_rng(seed).standard_normal((len(given), 6)).astype(np.float32)
        self.each("write", *pairs(*given), values, self.now_ms)

    @rule(given=KEYS)
    def restore(self, given: list[tuple[int, int]]) -> None:
        slots, keys = pairs(*given)
        width = self.both[0].defaults().state.shape[1]
        values, state = np.ones((len(keys), 6), np.float32), np.full((len(keys), width), 2, np.float32)
        uses = (np.arange(len(keys)) % 3).astype(np.uint8)
        rows = Rows(slots=slots, keys=keys, values=values, state=state, last_seen_ms=np.arange(len(keys)), uses=uses)
        self.each("restore", rows)

    @rule(given=KEYS)
    def remove(self, given: list[tuple[int, int]]) -> None:
        self.each("remove", *pairs(*given))

    @rule(given=KEYS)
    def export(self, given: list[tuple[int, int]]) -> None:
        first, second = self.each("export", *pairs(*given))
        if not isinstance(first, str):
            assert np.array_equal(first.state, second.state) and np.array_equal(first.last_seen_ms, second.last_seen_ms)
            assert np.array_equal(first.uses, second.uses)

    @rule(pause=st.integers(0, 12_000))
    def expire(self, pause: int) -> None:
        self.now_ms += pause
        first, second = self.each("expire", self.now_ms)
        assert first == second

    @rule(cursor=st.sampled_from(["publish", "checkpoint"]))
    def touched(self, cursor: str) -> None:
        first, second = self.each("touched", cursor)
        assert first.version == second.version
        assert live(first) == live(second) and gone(first) == gone(second)
        assert len(live(first)) == len(first.keys) and len(gone(first)) == len(first.removed_keys)
        self.versions[cursor] = first.version

    @rule(cursor=st.sampled_from(["publish", "checkpoint"]))
    def acknowledge(self, cursor: str) -> None:
        if cursor in self.versions:
            self.each("acknowledge", cursor, self.versions[cursor])

    @rule()
    def exchange_pending_and_defaults(self) -> None:
        first, second = self.both
        pending: Pending = first.pending()
        first.restore_pending(second.pending())
        second.restore_pending(pending)
        first.restore_defaults(second.defaults())

    @invariant()
    def same_rows(self) -> None:
        if not hasattr(self, "both"):
            return
        slots, keys = pairs(*((s, k) for s in (0, 1, 7) for k in [*EXTREMES, *range(10, 20), 77]))
        (values, found), (others, also) = self.each("lookup", slots, keys)
        assert np.array_equal(values, others) and np.array_equal(found, also)
        assert len(self.both[0]) == len(self.both[1]) == found.sum() <= self.layout.capacity
        counts = [
            set(zip(p.slots.tolist(), p.keys.tolist(), p.counts.tolist(), p.last_seen_ms.tolist(), strict=True))
            for p in self.each("pending")
        ]
        assert counts[0] == counts[1] and (not self.layout.spare or len(counts[0]) <= self.layout.capacity)
        assert [(table.evicted, table.refused) for table in self.both] == 2 * [
            (self.both[0].evicted, self.both[0].refused)
        ]
        sketches = [pending.sketch for pending in self.each("pending")]
        assert np.array_equal(*sketches)


class CudaAgrees(TablesAgree):
    make = cuda_table  # type: ignore[assignment]


QUICK = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TestTablesAgree = TablesAgree.TestCase
TestTablesAgree.settings = settings(QUICK, max_examples=60, stateful_step_count=40)
TestCudaAgrees = CudaAgrees.TestCase
TestCudaAgrees.settings = settings(
    QUICK, max_examples=60 if COMPILED else 6, stateful_step_count=40 if COMPILED else 12
)
