"""Keys and numbers: what the one feature function says, and that what is logged comes back as it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.config import Config, parse
from recsys.errors import BadInput
from recsys.features.build import Features, Signals, decode, encode, item_features, user_features
from recsys.features.catalogue import Catalogue
from recsys.features.schema import Schema
from recsys.keys import cross, key_of, mix
from recsys.types import Bool, Float32, HistoryEvent, Int64, Item


def event(item_id: str, time_ms: int) -> HistoryEvent:
    return HistoryEvent(time_ms=time_ms, event_id=str(time_ms), item_id=item_id, type="click")


def small() -> tuple[Config, Schema, Catalogue]:
    config = Config()
    schema = Schema.of(config)
    catalogue = Catalogue(schema, capacity=2)
    for number in range(5):
        tags = [f"t{number}", "all"][: 1 + number % 2]
        catalogue.apply(
            Item(item_id=f"i{number}", title=f"T{number}", attributes={"category": f"c{number % 2}", "tags": tags})
        )
    return config, schema, catalogue


def signals(schema: Schema, size: int) -> Signals:
    return Signals(
        counters=np.zeros((size, len(schema.counters.numbers)), np.float32),
        popularity=np.zeros(size, np.float32),
        covisit=np.zeros(size, np.float32),
        follows=np.zeros((size, 0), np.float32),
    )


def test_affinity_is_the_recency_weighted_share_of_the_history() -> None:
    _, schema, catalogue = small()
    user = user_features(schema, catalogue, "u", [event("i0", 1), event("i1", 2), event("i3", 3)], {})
    features = item_features(schema, catalogue, user, np.array([2, 1], np.int32), signals(schema, 2), 0.5)
    column = schema.numbers.index("affinity.category")
    # Newest first: i3 and i1 are of c1 (weights 1, .5), i0 of c0 (weight .25); item 2 is of c0, item 1 of c1.
    np.testing.assert_allclose(features.numbers[:, column], [0.25 / 1.75, 1.5 / 1.75], rtol=1e-6)
    assert features.numbers[:, schema.numbers.index("in_history")].tolist() == [0.0, 1.0]


def test_history_is_newest_first_and_unknown_items_keep_their_key() -> None:
    _, schema, catalogue = small()
    user = user_features(schema, catalogue, "7", [event("i0", 1), event("gone", 2)], {})
    assert user.shared_keys[0] == 7
    assert user.history_keys[:, 0].tolist() == [key_of("gone"), key_of("i0")]
    assert not user.history_mask[0, 1:].any()


def test_crosses_pair_present_columns_only() -> None:
    _, schema, catalogue = small()
    user = user_features(schema, catalogue, "u", [event("i4", 1)], {})
    features = item_features(schema, catalogue, user, np.array([0], np.int32), signals(schema, 1), 0.8)
    pair = cross(np.array([key_of("u")]), np.array([key_of("c0")]))[0]
    assert features.cross_keys[0, 0] == pair
    assert features.cross_mask[0, 0]
    with_history = schema.cross_slots == schema.slot("history*item")
    assert features.cross_mask[0][with_history].tolist() == [True, False, False, False, False]


def test_a_cross_pairs_any_two_fields_of_which_one_is_the_items() -> None:
    _, _, catalogue = small()
    pairs = [
        ("category", "tags"),
        ("category", "hour"),
        ("history.tags", "category"),
        ("item", "user"),
        ("hour", "tags"),
    ]
    schema = Schema.of(parse({"features": {"context": ["hour"], "crosses": pairs, "cross_history": 3}}))
    user = user_features(schema, catalogue, "u", [event("i3", 1), event("i1", 2)], {"hour": 7})
    features = item_features(schema, catalogue, user, np.array([1, 0], np.int32), signals(schema, 2), 0.8)
    item = {"category": ["c1"], "tags": ["t1", "all"], "item": ["i1"]}
    known = {**item, "user": ["u"], "hour": ["7"], "history.tags": ["t1", "all", "t3", "all"]}
    for left, right in pairs:
        where = schema.cross_slots == schema.slot(f"{left}*{right}")
        assert where.sum() == {"tags": 4, "history.tags": 12}.get(left, 1) * {"tags": 4}.get(right, 1)
        keys, mask = features.cross_keys[0, where], features.cross_mask[0, where]
        expected = [cross(np.array([key_of(x)]), np.array([key_of(y)]))[0] for x in known[left] for y in known[right]]
        assert keys[mask].tolist() == expected
        assert not keys[~mask].any()
    assert features.cross_mask[1].sum() == 1 + 1 + 4 + 1 + 1  # of one tag, not two


def resembling(schema: Schema, features: Features, decay: float) -> dict[str, Float32]:
    """What a history says of items, a field at a time in NumPy."""
    user, items = features.user, features.item_keys
    weights = decay ** np.arange(len(user.history_keys))
    found = {"in_history": np.isin(items[:, 0], user.history_keys[:, 0]).astype(np.float32)}
    for name in ("category", "tags"):
        where = schema.item_columns[name]
        present, theirs, has = user.history_mask[:, where], items[:, where], features.item_mask[:, where]
        keys, inverse = np.unique(user.history_keys[:, where][present], return_inverse=True)
        each = np.bincount(inverse, np.broadcast_to(weights[:, None], present.shape)[present])
        share = np.zeros(len(items))
        if len(keys):
            at = np.minimum(np.searchsorted(keys, theirs), len(keys) - 1)
            sums = (each[at] * ((keys[at] == theirs) & has)).sum(1)
            share = sums / np.maximum(has.sum(1), 1) / weights.sum()
        found[f"affinity.{name}"] = share.astype(np.float32)
    return found


@given(
    st.lists(st.integers(0, 8), max_size=60),
    st.lists(st.integers(0, 6), min_size=1, max_size=9),
    st.sampled_from([1.0, 0.8, 0.1]),
    st.integers(0, 2**32 - 1),
)
def test_what_a_history_says_of_items_is_that_of_numpy_bit_by_bit(
    past: list[int], shown: list[int], decay: float, seed: int
) -> None:
    rng, schema = np.random.default_rng(seed), Schema.of(Config())
    catalogue = Catalogue(schema)
    for number in range(7):  # the other items of the history are not known
        tags = [f"t{n}" for n in rng.permutation(6)[: rng.integers(5)]]
        given = {"tags": tags, "category": f"c{number % 3}"}
        catalogue.apply(
            Item(item_id=f"i{number}", attributes={n: v for n, v in given.items() if v and rng.random() < 0.8})
        )
    user = user_features(schema, catalogue, "u", tuple(event(f"i{n}", time) for time, n in enumerate(past)), {})
    features = item_features(schema, catalogue, user, np.array(shown, np.int32), signals(schema, len(shown)), decay)
    for name, expected in resembling(schema, features, decay).items():
        np.testing.assert_array_equal(features.numbers[:, schema.numbers.index(name)], expected, name)


def crossed(schema: Schema, features: Features) -> tuple[Int64, Bool]:
    """The kernel's keys and masks, a cross at a time in NumPy."""
    user, newest = features.user, slice(schema.cross_history)
    blocks = {
        "shared": (user.shared_keys[None], user.shared_mask[None]),
        "item": (features.item_keys, features.item_mask),
        "history": (user.history_keys[newest], user.history_mask[newest]),
    }
    keys = np.zeros((len(features.item_keys), len(schema.cross_slots)), np.int64)
    mask, start = np.zeros(keys.shape, np.bool_), 0
    for sides in schema.cross_sides:
        found = [[block[:, side.where] for block in blocks[side.block]] for side in sides]
        past = [[b.reshape(1, -1) if s.block == "history" else b for b in f] for s, f in zip(sides, found, strict=True)]
        (left, left_mask), (right, right_mask) = past
        both = np.broadcast_to(
            left_mask[:, :, None] & right_mask[:, None, :], (len(keys), left.shape[1], right.shape[1])
        )
        end = start + left.shape[1] * right.shape[1]
        keys[:, start:end] = np.where(both, cross(left[:, :, None], right[:, None, :]), 0).reshape(len(keys), -1)
        mask[:, start:end] = both.reshape(len(keys), -1)
        start += sides[0].width * sides[1].width
    return keys, mask


@given(
    st.lists(
        st.sampled_from(["user*item", "user*tags", "item*category", "history*item", "history.tags*tags", "city*tags"]),
        unique=True,
    ),
    st.lists(st.integers(0, 6), max_size=12),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.sampled_from([{}, {"city": "x"}]),
)
def test_crosses_are_those_of_numpy_bit_by_bit(
    names: list[str], past: list[int], shown: list[int], context: dict[str, str]
) -> None:
    config = parse({"features": {"crosses": [name.split("*") for name in names], "context": ["city"]}})
    schema = Schema.of(config)
    catalogue = Catalogue(schema)
    for number in range(5):
        tags = ["all", f"t{number}"][: number % 3]
        catalogue.apply(Item(item_id=f"i{number}", attributes={"category": "c", "tags": tags} if number else {}))
    history = tuple(event(f"i{number}", time) for time, number in enumerate(past))
    user = user_features(schema, catalogue, "u", history, context)
    found = item_features(schema, catalogue, user, np.array(shown, np.int32), signals(schema, len(shown)), 0.8)
    keys, mask = crossed(schema, found)
    np.testing.assert_array_equal(found.cross_keys, keys)
    np.testing.assert_array_equal(found.cross_mask, mask)


def test_each_sequence_keeps_its_newest_events_and_others_are_left_out() -> None:
    features = {"sequences": {"seen": ["click", "like"], "liked": ["like"]}, "history_len": 2, "time_gaps": True}
    _, _, catalogue = small()
    schema = Schema.of(parse({"features": features}))
    kinds = ["like", "like", "like", "click", "purchase", "click"]
    history = [
        HistoryEvent(time_ms=1000 * n, event_id=str(n), item_id=f"i{n}", type=kind) for n, kind in enumerate(kinds)
    ]
    user = user_features(schema, catalogue, "u", history, {}, 6000)
    assert user.history_keys[:, 0].tolist() == [key_of(f"i{n}") for n in (5, 3, 2, 1)]
    assert user.history_kinds.tolist() == [0b01, 0b01, 0b10, 0b10]
    assert user.history_gaps.tolist() == [1, 3, 3, 3]  # floor(1.5 log2(1 + s)) after 1, 3, 4 and 5 s


@given(
    st.lists(st.integers(0, 4), min_size=0, max_size=6),
    st.lists(st.integers(0, 4), min_size=0, max_size=3, unique=True),
)
def test_what_was_encoded_is_decoded(past: list[int], shown: list[int]) -> None:
    _, schema, catalogue = small()
    user = user_features(schema, catalogue, "u", [event(f"i{n}", t) for t, n in enumerate(past)], {})
    features = item_features(schema, catalogue, user, np.array(shown, np.int32), signals(schema, len(shown)), 0.8)
    back = decode(schema, encode(features))
    for name in ("item_keys", "item_mask", "cross_keys", "cross_mask", "numbers"):
        np.testing.assert_array_equal(getattr(back, name), getattr(features, name))
    for name in ("shared_keys", "shared_mask", "history_keys", "history_mask", "history_kinds", "history_gaps"):
        np.testing.assert_array_equal(getattr(back.user, name), getattr(user, name))


@pytest.mark.parametrize("cut", [0, 3, 4, 50, -1])
def test_features_of_another_length_are_refused(cut: int) -> None:
    _, schema, catalogue = small()
    user = user_features(schema, catalogue, "u", [], {})
    data = encode(item_features(schema, catalogue, user, np.array([1], np.int32), signals(schema, 1), 0.8))
    with pytest.raises(BadInput, match="bytes"):
        decode(schema, data[:cut])


def test_a_number_that_is_not_finite_is_refused() -> None:
    _, schema, catalogue = small()
    user = user_features(schema, catalogue, "u", [], {})
    features = item_features(schema, catalogue, user, np.array([1], np.int32), signals(schema, 1), 0.8)
    features.numbers[0, 0] = np.nan
    with pytest.raises(BadInput, match="finite"):
        decode(schema, encode(features))


def test_deleted_items_keep_their_row_and_come_back() -> None:
    _, _, catalogue = small()
    row = catalogue.apply(Item(item_id="i1", deleted=True))
    assert (row, catalogue.num_alive, bool(catalogue.alive[row])) == (1, 4, False)
    assert catalogue.apply(Item(item_id="i1", title="again")) == row
    assert (catalogue.num_alive, catalogue.item(row).title) == (5, "again")
    assert catalogue.apply(Item(item_id="never", deleted=True)) == -1


def test_schema_hash_changes_with_the_slots_and_only_with_them() -> None:
    config = Config()
    schema = Schema.of(config)
    before = schema.hash
    assert schema.item_slots is schema.item_slots  # cached values are no part of it
    assert Schema.of(config).hash == before
    assert Schema.of(parse({"features": {"context": ["hour"]}})).hash != before


@pytest.mark.parametrize(
    ("text", "key"), [("0", 0), ("-1", -1), ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63))]
)
def test_canonical_integers_are_their_own_key(text: str, key: int) -> None:
    assert key_of(text) == key


@pytest.mark.parametrize("text", ["007", "-0", "+1", "9223372036854775808", "１", " 1", "a"])
def test_other_strings_are_hashed(text: str) -> None:
    assert str(key_of(text)) != text.strip()
    assert -(2**63) <= key_of(text) < 2**63


def test_mix_is_the_published_splitmix64() -> None:
    # First output of splitmix64 seeded with 1234567 (Rosetta Code's published test vector).
    assert mix(np.array([1234567], np.int64))[0] == 6457827717110365317
