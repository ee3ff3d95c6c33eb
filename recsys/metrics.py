"""Every Prometheus metric of every process, named here and nowhere else.

Names carry their unit; latencies are histograms; a label has few values (never a user, an item or a request).
A process exports all of them; what it does not do stays 0 or empty. `docs/metrics.md` is made from this file.
"""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

REGISTRY = CollectorRegistry()
"""Our own: whatever a library registers globally is not exported."""
ProcessCollector(registry=REGISTRY)


def _seconds(*milliseconds: float) -> tuple[float, ...]:
    return tuple(ms / 1000 for ms in milliseconds)


ANSWER_BUCKETS_S = _seconds(1, 2, 3, 5, 7.5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000)
STAGE_BUCKETS_S = _seconds(0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 50, 100, 200, 500)
FRESHNESS_BUCKETS_S = _seconds(
    5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000, 10_000, 30_000, 60_000
)
WORK_BUCKETS_S = _seconds(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000)
"""Steps, publishing, checkpoints, snapshots: from a millisecond to a minute."""

_counter = partial(Counter, registry=REGISTRY)
_gauge = partial(Gauge, registry=REGISTRY)
_histogram = partial(Histogram, registry=REGISTRY)

# Every process
READY = _gauge("recsys_ready", "1 while /readyz answers 200, else 0.")
CONSUMER_LAG = _gauge(
    "recsys_consumer_lag_records",
    "Records appended that this consumer has not read yet.",
    ("topic", "partition", "consumer"),
)
ERRORS_LOGGED = _counter("recsys_errors_logged_total", "Log lines of level ERROR: what somebody should read.")
DEAD_LETTERS = _counter(
    "recsys_dead_letters_total",
    "Messages that could not be used, by topic they came from and reason.",
    ("topic", "reason"),
)
LOG_GAPS = _counter(
    "recsys_log_gaps_total",
    "Saved positions that their log does not have any more (another log, or records lost), found at start: ServiceNotReady in the runbook.",
    ("consumer", "topic"),
)
DAMAGED_RECORDS = _counter(
    "recsys_damaged_records_total",
    "Records whose checksum did not hold when they were read, by where: they were skipped, what follows them was read.",
    ("where",),
)
STUCK_WAITS = _counter(
    "recsys_stuck_waits_total",
    "Waits on Kafka's client that did not end by themselves: its connections were made anew.",
)
SPOOL_WAIT_SECONDS = _gauge(
    "recsys_spool_wait_seconds",
    "How long accepted bytes have waited for the broker without a step forward; 0 when none wait.",
)
SPOOL_FULL = _gauge("recsys_spool_full_ratio", "Bytes in the spool over `log.spool_bytes`.")
DISK_FULL = _gauge("recsys_disk_full_ratio", "Used share of the disk that the data folder is on.")
SPOOL_BYTES = _gauge("recsys_spool_bytes", "Bytes accepted that the broker has not acknowledged yet.")
FRESHNESS_SECONDS = _histogram(
    "recsys_freshness_seconds",
    "From feedback accepted (log time) to answers that know it, by kind: user_state, counters, parameters.",
    ("kind",),
    buckets=FRESHNESS_BUCKETS_S,
)

# Ranking
HTTP_REQUESTS = _counter(
    "recsys_http_requests_total", "HTTP requests answered, by route template and status code.", ("route", "status")
)
RECOMMEND_SECONDS = _histogram(
    "recsys_recommend_seconds", "Time to answer /v1/recommend, whatever the status.", buckets=ANSWER_BUCKETS_S
)
STAGE_SECONDS = _histogram(
    "recsys_stage_seconds",
    "Time of one stage of an answer: state, candidates, features, lookup, score, slate, log.",
    ("stage",),
    buckets=STAGE_BUCKETS_S,
)
FEEDBACK = _counter(
    "recsys_feedback_total", "Feedback events over HTTP, by outcome: accepted, duplicate, rejected.", ("outcome",)
)
FEEDBACK_NOTES = _counter(
    "recsys_feedback_notes_total",
    "Feedback, over HTTP or read from the log, that something, or all, will not use, by note: too_late, unknown_type, no_request, "
    "unknown_item, unknown_request, clamped_time. See docs/events.md.",
    ("note",),
)
CONNECTIONS_FULL = _gauge(
    "recsys_connections_full_ratio",
    "Open HTTP connections of those there may be; at 1 the longest idle one makes room, and where none is idle new ones get 503.",
)
BODIES_FULL = _gauge(
    "recsys_bodies_full_ratio",
    "Bytes of request bodies under way of those there may be; at 1 bodies above 64 kB get 503 until others are done.",
)
DIGESTS_FULL = _gauge(
    "recsys_digests_full_ratio",
    "How full the fullest set of ids is by which a process knows copies; a full one forgets its oldest early, and what they are of is too_late.",
)
DEGRADED = _counter(
    "recsys_degraded_total", "Answers that had to do without something, by what was missing.", ("reason",)
)
SHOWN = _counter(
    "recsys_shown_total", "Items shown, by candidate source (an item of two sources counts for both).", ("source",)
)
BANDIT_SHOWN = _counter(
    "recsys_bandit_shown_total",
    "Items shown that have an edge to an active cluster, from any source: `fresh` where some of its edges was never shown before, else "
    "`known`.",
    ("tier",),
)
NOT_COUNTED = _counter(
    "recsys_not_counted_total",
    "Feedback that moves no counter, by reason: `user_limit` (the user had their say on the item), `unknown_item` (it waited for an item that "
    "did not come before too many others waited).",
    ("reason",),
)
CONTEXTS_FULL = _gauge(
    "recsys_contexts_full_ratio", "Share of the bytes for impressions of the last hour; at 1 the oldest go."
)
COUNTERS_FULL = _gauge(
    "recsys_counters_full_ratio", "Share of the rows of counters, or of co-visited pairs; at 1 those counted least go."
)
HELD_FULL = _gauge(
    "recsys_held_full_ratio", "Share of what may wait for its item or impression; at 1 the oldest is given up."
)
USER_STATE_FULL = _gauge(
    "recsys_user_state_full_ratio",
    "Share of the bytes for embedded user state; at 1 users leave, the longest away first.",
)
USER_CACHE_BYTES = _gauge(
    "recsys_user_cache_bytes",
    "Bytes of users' states held parsed; at their share of the memory those longest not asked for go, and are read again.",
)
USERS_LEFT = _counter("recsys_users_left_total", "Users whose embedded state made room for others.")
LOOKUP_SECONDS = _histogram(
    "recsys_lookup_seconds",
    "Time of one row lookup at the parameter service, as the caller sees it.",
    buckets=STAGE_BUCKETS_S,
)
LOOKUP_KEYS = _counter("recsys_lookup_keys_total", "Keys asked of the parameter service.")
PARAMETERS_SHARED = _gauge(
    "recsys_parameters_shared",
    "1 while rows are read in place from the memory of a parameter service on this host; 0: asked for over gRPC.",
)
CATALOGUE_ITEMS = _gauge("recsys_catalogue_items", "Items that can be shown.")
CATALOGUE_FULL = _gauge(
    "recsys_catalogue_full_ratio", "Share of the bytes for items; at 1 new ones are refused, others change."
)
CATALOGUE_REFUSED = _counter(
    "recsys_catalogue_refused_total", "New items of topic item that are not in the catalogue because it was full."
)
GENERATION_ITEMS = _gauge("recsys_generation_items", "Items in the retrieval index in use.")
GENERATION_RECALL = _gauge(
    "recsys_generation_recall_ratio", "Recall@100 of the retrieval index in use, measured when it was built."
)
UNUSABLE_VECTORS = _counter(
    "recsys_unusable_vectors_total",
    "Vectors of retrieval's towers that have no direction (0 or not finite), by whose: an `item` is left out of the index or buffer it was "
    "to be placed in, a `user` gets no candidates of `nearest` and `bandit`.",
    ("of",),
)
GENERATION_FAILURES = _counter("recsys_generation_failures_total", "Builds of a retrieval generation that failed.")
GENERATION_AGE_SECONDS = _gauge("recsys_generation_age_seconds", "Since the retrieval generation in use was built.")

# Embedding table (trainer and parameter)
TABLE_ROWS = _gauge("recsys_table_rows", "Rows held, by row layout.", ("layout",))
TABLE_BYTES = _gauge("recsys_table_bytes", "Bytes of the rows and the index, by row layout.", ("layout",))
TABLE_FULL_RATIO = _gauge(
    "recsys_table_full_ratio",
    "Rows held, of those the table has room for; from .9 on rows of least worth go.",
    ("layout",),
)
TABLE_EVICTED_ROWS = _counter(
    "recsys_table_evicted_rows_total",
    "Rows of least worth that went to make room for others, by row layout.",
    ("layout",),
)
TABLE_REFUSED_KEYS = _counter(
    "recsys_table_refused_keys_total",
    "Keys that found no room: more came at once than the table holds. They use the default vector and are admitted later.",
    ("layout",),
)
TABLE_FOUND_KEYS = _counter("recsys_table_found_keys_total", "Keys looked up that had a row.")
TABLE_MISSING_KEYS = _counter(
    "recsys_table_missing_keys_total", "Keys looked up that had no row and got the default vector."
)
TABLE_EXPIRED_ROWS = _counter(
    "recsys_table_expired_rows_total", "Rows forgotten because they were not seen for too long."
)

# Trainer
EXAMPLES = _counter("recsys_examples_total", "Labels trained, by task and label (0 or 1).", ("task", "label"))
JOINED = _counter(
    "recsys_joined_total",
    "Records at the joiner, by outcome. Feedback: joined, duplicate, too_late, unknown_item, no_request, no_impression, not_opened (its "
    "impression had no features or found no room), not_held (given up where too much came ahead of its impression), forget; impressions: "
    "impression_opened, impression_duplicate, impression_no_features, impression_no_room, impression_too_late.",
    ("outcome",),
)
BANDIT_REWARDS = _counter(
    "recsys_bandit_rewards_total",
    "Feedback of a rewarded type that names a request, by outcome: rewarded, duplicate, no_edge (the bandit had no edge to the item), "
    "too_late, no_impression, no_room.",
    ("outcome",),
)
BANDIT_CLUSTERS = _gauge(
    "recsys_bandit_clusters",
    "Clusters that the bandit tells users apart by; its edges are the rows of the table `edge`.",
)
OPEN_IMPRESSIONS = _gauge("recsys_open_impressions", "Impressions whose label windows are still open.")
OPEN_IMPRESSIONS_FULL = _gauge(
    "recsys_open_impressions_full_ratio", "Share of the bytes for open impressions; at 1 new ones are not learned from."
)
HELD_FEEDBACK_FULL = _gauge(
    "recsys_held_feedback_full_ratio",
    "Share of the bytes for feedback ahead of its impression; at 1 what waited longest is given up.",
)
TOWER_USERS_FULL = _gauge(
    "recsys_tower_users_full_ratio",
    "Share of the users that the towers may know the past of; at 1 those least recently active leave.",
)
PROGRESSIVE_LOG_LOSS = _gauge(
    "recsys_progressive_log_loss",
    "Mean log loss (nats) of the predictions as served, over the last examples, by task.",
    ("task",),
)
PROGRESSIVE_NORMALIZED_ENTROPY = _gauge(
    "recsys_progressive_normalized_entropy",
    "Progressive log loss over the entropy of the label rate, by task; 1 knows only the rate.",
    ("task",),
)
CALIBRATION_RATIO = _gauge(
    "recsys_calibration_ratio",
    "Sum of predictions over sum of labels, over the last examples, by task; 1 is right.",
    ("task",),
)
TRAIN_STEP_SECONDS = _histogram(
    "recsys_train_step_seconds", "Time of one trainer step: join, train, mark touched.", buckets=WORK_BUCKETS_S
)
SKIPPED_BATCHES = _counter(
    "recsys_skipped_batches_total",
    "Batches not learned because their gradients were not finite, by task they came from (`two_tower`: the retrieval towers).",
    ("task",),
)
GATE_WEIGHT = _gauge(
    "recsys_gate_weight_ratio",
    "HoME: mean share of an expert in an output of a level, over the last batch; near 1 the other experts have collapsed.",
    ("level", "output", "expert"),
)
EXPERT_SCALE = _gauge(
    "recsys_expert_scale", "HoME: mean absolute output of an expert over the last batch.", ("level", "expert")
)
DEAD_UNITS = _gauge(
    "recsys_dead_units_ratio", "HoME: share of an expert's units silent in the whole last batch.", ("level", "expert")
)
COMPILE_SECONDS = _gauge(
    "recsys_compile_seconds",
    "Time to compile the networks' operations at start, or to read them from the cache; 0 while they run op by op.",
)
SCORING_COMPILED = _gauge(
    "recsys_scoring_compiled",
    "1 once requests are scored in compiled calls, 0 while NumPy does it, or torch: docs/models.md.",
)
JOURNAL_STEPS = _counter("recsys_journal_steps_total", "Steps written to the journal and run.")
TIME_AHEAD = _counter(
    "recsys_time_ahead_total",
    "Records whose log time led the trainer's clock by more than 60 s, and counted as of now.",
)
TIME_SET_BACK = _counter(
    "recsys_time_set_back_total",
    "Times that the trainer's log time was more than 60 s ahead of its clock, and went on from now.",
)
STEP_FAILURES = _counter(
    "recsys_step_failures_total",
    "Trainer steps that raised, and were run again without the records that made them fail.",
)
BREAKER_OPEN = _gauge("recsys_breaker_open", "1 while learning waits because the feedback looks broken, else 0.")
MODEL_HELD = _gauge(
    "recsys_model_held",
    "1 while what is learned is not served, because it is worse than the last good checkpoint, else 0.",
)
TRAINER_EPOCH = _gauge("recsys_trainer_epoch", "Epoch of this trainer: one more at each start; the higher one wins.")
CHECKPOINT_SECONDS = _histogram(
    "recsys_checkpoint_seconds", "Time to write a checkpoint, from the copy to the cut journal.", buckets=WORK_BUCKETS_S
)
CHECKPOINT_AGE_SECONDS = _gauge("recsys_checkpoint_age_seconds", "Since the last checkpoint was complete.")
PUBLISH_SECONDS = _histogram(
    "recsys_publish_seconds", "Time to publish one delta, until the log acknowledged it.", buckets=WORK_BUCKETS_S
)
PUBLISHED_ROWS = _counter("recsys_published_rows_total", "Rows published in deltas.")
PUBLISHED_TOMBSTONES = _counter(
    "recsys_published_tombstones_total", "Tombstones of forgotten rows published in deltas."
)

# Parameter
DELTAS_APPLIED = _counter("recsys_deltas_applied_total", "Whole deltas applied to the serving copy.")
DELTAS_IGNORED = _counter(
    "recsys_deltas_ignored_total", "Whole deltas not applied because a newer epoch or step came before them."
)
PARAMETER_GAPS = _counter(
    "recsys_parameter_gaps_total",
    "Times that deltas were missing before what the log still had, by what was served instead: checkpoint (the trainer's), log.",
    ("instead",),
)
PARAMETER_DEVICE_INFO = _gauge(
    "recsys_parameter_device_info",
    "1 for where the parameter service keeps its tables: cpu, reference or cuda.",
    ("device",),
)
PARAMETER_VERSION_STEP = _gauge("recsys_parameter_version_step", "Trainer step of the last delta applied.")
SNAPSHOT_SECONDS = _histogram(
    "recsys_snapshot_seconds", "Time to write a snapshot of the serving copy.", buckets=WORK_BUCKETS_S
)


def render() -> bytes:
    """All metrics in Prometheus text format."""
    return generate_latest(REGISTRY)
