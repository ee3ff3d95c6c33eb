"""Every option, in frozen models: unit, default and what it is for."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recsys.config.bandit_section import BanditConfig
from recsys.config.features import CatalogueConfig, FeaturesConfig
from recsys.config.feedback import FeedbackConfig
from recsys.config.formula import formula
from recsys.config.slate_section import SlateConfig
from recsys.config.source_list import SOURCES, default_quotas, described
from recsys.config.source_list import check as check_sources
from recsys.config.stores import CapacityConfig, LogConfig, StateConfig
from recsys.config.tasks import LATE, NEVER, Section, TaskConfig, check, expanded, quantities

MAX_SOCKET_PATH = 100
"""Bytes of a Unix socket's path that every system takes; a longer data folder gets a socket in the temporary folder."""


Layers = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(max_length=8)]
"""Widths of layers, one behind the other."""


class ModelConfig(Section):
    """DIN + HoME ranker with a wide part, and the two-tower retrieval model."""

    dim: int = Field(16, ge=4, le=128)
    """Width of each embedding."""
    attention: Layers = (32, 16)
    """DIN attention layers; none: the mean of the history."""
    attention_activation: Literal["dice", "prelu"] = "dice"
    """Activation of the attention's layers."""
    attention_softmax: bool = False
    """Let the weights of a history sum to 1; else their sum says how much of it a candidate wakes."""
    input_width: int = Field(0, ge=0, le=4096)
    """Compress HoME's input to this width by one linear map, whose user part is computed once a request; 0: do not."""
    experts: int = Field(2, ge=1, le=8)
    """Experts of each HoME group."""
    expert_hidden: Layers = (32, 32)
    """Layers of one expert."""
    tower_hidden: Layers = (16,)
    """Layers of one task tower."""
    feature_gate_rank: int = Field(16, ge=1, le=4096)
    """Rank of HoME's feature gate."""
    home_without: tuple[Literal["norm", "hierarchy", "feature_gate", "self_gate"], ...] = ()
    """Parts of HoME to leave out, to see what they bring."""
    tower_dim: int = Field(32, ge=4, le=256)
    """Width of user and item vectors of the two-tower model."""
    interests: int = Field(1, ge=1, le=8)
    """Vectors of a user, each of which attends to the history in its own way and is searched with: 2 to 4 for users of many tastes."""
    temperature: float = Field(0.07, gt=0)
    """Two-tower softmax temperature."""
    hard_negatives: int = Field(3, ge=0, le=20)
    """Items last shown to a user without being acted upon that its positives are told from, beside those of the batch."""
    calibrate: bool = False
    """Correct each task's log-odds by a bias and a slope that follow the stream."""
    error_memory: float = Field(0.0, ge=0, le=1)
    """Correct predictions by this share of what the network was lately off by on similar examples (ReLoop2); 0: do not."""
    dense_optimizer: Literal["adam", "adagrad"] = "adam"
    """Optimiser of dense weights."""
    dense_learning_rate: float = Field(0.003, gt=0)
    """Step of dense weights."""
    row_learning_rate: float = Field(0.05, gt=0)
    """Step of embedding rows."""
    row_optimizer: Literal["rowwise_adagrad", "adagrad", "adam"] = "rowwise_adagrad"
    """Optimiser of embedding rows; row-wise keeps one sum of squares a row."""
    row_l2: float = Field(0.0, ge=0)
    """Mini-batch aware L2 of embeddings: this over how often a row was seen, times the row, is added to its gradient."""
    wide_learning_rate: float = Field(0.2, gt=0)
    """Step of wide weights."""
    wide_optimizer: Literal["adagrad", "ftrl"] = "adagrad"
    """Optimiser of wide weights; FTRL (proximal) can shrink them and leave rare ones exactly 0."""
    wide_l1: float = Field(0.0, ge=0)
    """FTRL: a weight whose summed gradients stay below this is 0."""
    wide_l2: float = Field(0.0, ge=0)
    """FTRL: pulls weights to 0."""
    init_scale: float = Field(0.05, ge=0)
    """New embeddings are uniform in ± this."""
    affinity_prior: float = 5.0
    """Starting logit weight of attribute affinity (0–1): the first personalisation, before anything is learned."""
    covisit_prior: float = 0.5
    """Starting logit weight of log co-visits with the user's history."""
    popularity_prior: float = 0.2
    """Starting logit weight of log popularity."""


class TableConfig(Section):
    """The embedding table."""

    implementation: Literal["cpu", "reference"] = "cpu"
    """`reference` is the slow oracle."""
    capacity: int = Field(0, ge=0, le=2**28 - 2**16)
    """Rows of each layout; 0: as many as its share of `capacity.memory_bytes` holds. From 90% on rows of least worth make room,
    rows are never merged. Memory is touched only as rows come."""
    admission: int = Field(1, ge=1)
    """Occurrences in training before a key gets its own row."""
    expiry_s: float | None = 90 * 86_400.0
    """Rows not seen for this long are forgotten."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of embeddings in memory: a half takes half of it, and steps smaller than its last bit need `stochastic` rounding to count."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How a training step stores a half; stochastic is right on average, and the same in a replay."""
    filter_counters: int = Field(0, ge=0)
    """0: keys waiting for admission are counted exactly. Otherwise a filter of this many bytes a layout counts them, and admits some early."""


class TrainingConfig(Section):
    """The online trainer."""

    batch_size: int = Field(256, ge=1, le=65_536)
    """Largest number of examples of one gradient step."""
    publish_ms: int = Field(100, ge=1)
    """Rows are published at least this often."""
    dense_publish_s: float = Field(2.0, gt=0)
    """Dense weights are published this often."""
    checkpoint_s: float = Field(30.0, gt=0)
    """A checkpoint is taken this often."""
    expire_every_steps: int = Field(100, ge=1)
    """The expiry sweep goes on at every this many steps."""
    breaker_rate: tuple[float, float] = (0.0, 0.98)
    """Click rate of the last `breaker_examples` outside these bounds stops learning; below the lower one only while clicks do not come
    at all, or as rarely for what is shown: answers that nobody waited for are load."""
    breaker_examples: int = Field(2000, ge=100)
    """Examples behind the breaker's rate."""
    hold_margin: float = Field(0.1, ge=0)
    """A task that was good and whose loss exceeds by this share what always predicting its rate would cost is no longer served: the last
    good checkpoint is, until the model is good again; 0: whatever was learned is served."""
    hold_examples: int = Field(2000, ge=100)
    """Last labels of a task that tell how good its predictions are."""
    kept_checkpoints: int = Field(2, ge=0)
    """Older good checkpoints that `recsys rollback` can go back to; each may take as much disk as the tables."""
    keep_every_s: float = Field(21_600.0, gt=0)
    """So far apart in log time they are."""
    pool_negatives: int = Field(50, ge=1)
    """Replay of a click log: candidates not clicked that a request is learned from, drawn by a hash."""
    two_tower: bool = True
    """Train the retrieval towers."""


class RetrievalConfig(Section):
    """Candidate sources: how many candidates each may bring."""

    sources: dict[str, Annotated[int, Field(ge=0, le=10_000)]] = Field(
        default_factory=default_quotas, description=f"Source name → most candidates: {described()}."
    )
    learn_quotas: bool = False
    """Let the quotas follow how often each source's shown items are acted upon, within half and twice of what is configured."""
    trending_half_life_s: float = Field(1800.0, gt=0)
    """Half-life of the trending counts."""
    covisit_half_life_s: float = Field(86_400.0, gt=0)
    """Half-life of the co-visit counts."""
    covisit_backward: float = Field(0.2, ge=0, le=1)
    """Weight of earlier←later pairs; later←earlier pairs weigh 1."""
    covisit_neighbours: int = Field(100, ge=1)
    """Neighbours kept of each item."""
    covisit_window: int = Field(3, ge=1)
    """Events of the same session before an event that it is paired with; at most 3 count."""
    covisit_history: int = Field(3, ge=1)
    """Newest items of the session (without one: of the history) whose neighbours are candidates."""
    count_types: tuple[str, ...] = ("click", "like", "purchase")
    """Feedback types that trending and co-visits count."""
    session_gap_s: float = Field(1800.0, gt=0)
    """Without session ids, a pause this long starts a new session."""
    hubness: float = Field(0.0, ge=0, le=100)
    """Correct `nearest` for items that are near to everything (DBNorm): the sharper, the more only what is nearest to an item counts; 0: do not."""
    exact_buffer: int = Field(50_000, ge=1)
    """New, changed and recently touched items searched exactly beside the index."""
    rebuild_s: float = Field(600.0, gt=0)
    """A new retrieval generation is built this often."""


class RankingConfig(Section):
    """The ranking service."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """HTTP port of the API."""
    scorer: Literal["model", "sources"] = "model"
    """`sources`: rank by source scores alone."""
    value: str = ""
    """What ranks, a formula over the tasks' predictions such as `click * (1 + 5 * like)`: numbers, + - * / **, log, exp, sqrt,
    min, max; 0 and below rank last. Empty: their sum weighted by `tasks.weight`."""
    full_candidates: int = Field(200, ge=1)
    """Candidates that the whole network scores, the best by its wide part; double costs twice the scoring."""
    exclude: Literal["session", "history", "none"] = "history"
    """Items not shown again: those clicked in this session, all in the history, or none."""
    deadline_ms: float = Field(200.0, gt=0)
    """Time a request may take; stages that would start after it are skipped and the answer is `degraded`."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Larger bodies are refused with 413."""
    max_inflight: int = Field(64, ge=1)
    """Requests under way at once; beyond it 503 with Retry-After."""
    log_impressions: bool = True
    """Write impressions; off only in read-only copies."""


class ParameterConfig(Section):
    """The parameter service."""

    address: str = ""
    """gRPC address, `host:port` or `unix:/path`; empty: a Unix socket in the data folder."""
    metrics_port: int = Field(8001, ge=0, le=65535)
    """HTTP port of /metrics, /healthz, /readyz."""
    snapshot_s: float = Field(60.0, gt=0)
    """A snapshot is taken this often."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the tables lie; `auto`: on a CUDA device if there is one."""


class TrainerConfig(Section):
    """The trainer service."""

    metrics_port: int = Field(8002, ge=0, le=65535)
    """HTTP port of /metrics, /healthz, /readyz."""


class Config(Section):
    """The whole configuration."""

    data_dir: Path = Path("recsys-data")
    """Folder of the embedded log, user state, journal, checkpoints and snapshots."""
    seed: int = 0
    """Seeds row initialisation, dense weights and draws."""
    log: LogConfig = LogConfig()
    state: StateConfig = StateConfig()
    capacity: CapacityConfig = CapacityConfig()
    catalogue: CatalogueConfig = CatalogueConfig()
    features: FeaturesConfig = FeaturesConfig()
    tasks: tuple[TaskConfig, ...] = (
        TaskConfig(name="click", types=("click",), window_s=60.0),
        TaskConfig(name="like", types=("like", "purchase"), window_s=600.0, weight=0.5, prior=0.01),
    )
    feedback: FeedbackConfig = FeedbackConfig()
    model: ModelConfig = ModelConfig()
    table: TableConfig = TableConfig()
    training: TrainingConfig = TrainingConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    bandit: BanditConfig = BanditConfig()
    ranking: RankingConfig = RankingConfig()
    slate: SlateConfig = SlateConfig()
    parameter: ParameterConfig = ParameterConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="before")
    @classmethod
    def _expand_tasks(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and isinstance(raw.get("tasks"), list | tuple):
            return {**raw, "tasks": expanded(raw["tasks"])}
        return raw

    @model_validator(mode="after")
    def _names_agree(self) -> Config:
        check(self.tasks)
        if self.ranking.value:
            formula(self.ranking.value, self.value_names)
        attributes = set(self.catalogue.attributes)
        self.features.check(self.catalogue)
        self.feedback.check(self.retrieval.count_types)
        check_sources(self.retrieval.sources)
        self.slate.check(attributes, SOURCES, self.state.seen_len)
        return self

    @property
    def explores(self) -> bool:
        """Whether there is a bandit: it is a source, and there are user vectors to tell clusters by."""
        return bool(self.retrieval.sources.get("bandit")) and self.training.two_tower

    @property
    def quantities(self) -> dict[str, dict[str, float]]:
        """Expected values of tasks with buckets: name → (task → what its probability adds)."""
        return quantities(self.tasks)

    @property
    def types_alone(self) -> frozenset[str]:
        """Feedback types that something uses whether or not they name a request."""
        used = (self.features.history_types, self.features.elsewhere_types, self.retrieval.count_types)
        said = (self.feedback.negative, self.feedback.hide)
        return frozenset(("view", *(kind for kinds in (*used, *said) for kind in kinds)))

    @property
    def types_joined(self) -> frozenset[str]:
        """Feedback types that make a label or a reward of an answer that they name."""
        labels = (kind for task in self.tasks for kind in task.types)
        return frozenset((*labels, *(self.bandit.reward_types if self.explores else ())))

    @property
    def value_names(self) -> list[str]:
        """What `ranking.value` may name: quantities, and tasks that are not part of one."""
        parts = {part for steps in self.quantities.values() for part in steps}
        parts |= {task.name for task in self.tasks if task.name.endswith((LATE, NEVER))}
        return [*(task.name for task in self.tasks if task.name not in parts), *self.quantities]

    @property
    def parameter_address(self) -> str:
        """Where the parameter service listens."""
        if self.parameter.address:
            return self.parameter.address
        path = str((self.data_dir / "parameter.sock").absolute())
        if len(path.encode()) > MAX_SOCKET_PATH:
            name = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
            path = str(Path(tempfile.gettempdir()) / f"recsys-{name}.sock")
        return f"unix:{path}"
