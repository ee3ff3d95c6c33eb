"""Configuration: frozen, strict, and clear about what is wrong."""

from pathlib import Path

import pytest

from recsys.config import Config, load, parse
from recsys.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "deploy" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_committed_configurations_are_valid(path: Path) -> None:
    assert isinstance(load(path, {}), Config)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"rankin": {}}, ["rankin", "'ranking'"]),
        ({"ranking": {"prt": 1}}, ["ranking.prt", "'ranking.port'"]),
        ({"ranking": {"port": 99999}}, ["ranking.port", "99999", "65535"]),
        ({"tasks": []}, ["tasks", "at least one"]),
        ({"features": {"crosses": [["nobody", "item"]]}}, ["nobody", "user"]),
        ({"features": {"crosses": [["item", "history"]]}}, ["'history'", "with one of", "'item'"]),
        ({"features": {"crosses": [["history.price", "item"]]}}, ["history.price", "history.category"]),
        ({"features": {"crosses": [["user", "user"]]}}, ["the same for every candidate", "'category'"]),
        ({"features": {"buckets": {"tags": [1]}}}, ["'tags'", "rising", "['category']"]),
        ({"features": {"buckets": {"category": []}}}, ["'category' = []", "rising"]),
        ({"features": {"numbers": ["tags"]}}, ["features.numbers", "'tags'", "catalogue.multivalued"]),
        ({"features": {"time_since": ["at", "at"]}}, ["features.time_since", "'at'", "once"]),
        ({"features": {"history_attributes": ["colour"]}}, ["colour", "catalogue.attributes"]),
        ({"retrieval": {"sources": {"magic": 3}}}, ["magic", "unknown source"]),
        ({"features": {"sequences": {"seen": ["glance"]}}}, ["seen", "glance", "features.history_types"]),
        ({"ranking": {"value": "click + views"}}, ["'views'", "click, like"]),
        ({"tasks": [{"name": "a", "types": ["a"], "after": "b"}]}, ["'a' is after 'b'", "named before"]),
        (
            {"tasks": [{"name": "a", "types": ["a"]}, {"name": "b", "types": ["b"], "after": "a"}]},
            ["prior of 'b'", "below"],
        ),
        ({"tasks": [{"name": "w", "types": ["v"], "buckets": [3, 2]}]}, ["'w'", "rise"]),
        ({"bandit": {"half_life_s": float("inf")}}, ["bandit.half_life_s = inf", "finite"]),
        (
            {"retrieval": {"sources": {"trending": -1}}},
            ["retrieval.sources.trending = -1", "greater than or equal to 0"],
        ),
        ({"retrieval": {"sources": {"nearest": 10_001}}}, ["nearest = 10001", "less than or equal to 10000"]),
        ({"tasks": [{"name": ["w"], "types": ["v"], "buckets": [3]}]}, ["a name must be text", "['w']"]),
        ({"tasks": [{"name": "w", "types": ["v"], "buckets": 3}]}, ["'w'", "list of numbers", "3"]),
        ({"tasks": [{"name": "w", "types": ["v"], "buckets": ["3"]}]}, ["'w'", "list of numbers", "['3']"]),
        ({"tasks": [{"name": "w", "types": ["v"], "buckets": [3], "prior": "x"}]}, ["prior of 'w'", "number", "'x'"]),
        ({"tasks": [{"types": ["v"], "labels": "es_dfm"}]}, ["tasks", "name", "required"]),
        ({"model": {"attention": [2**53]}}, ["model.attention", "4096"]),
        ({"model": {"tower_hidden": [0]}}, ["model.tower_hidden", "1"]),
        ({"model": {"expert_hidden": [8] * 3000}}, ["model.expert_hidden", "8"]),
        ({"tasks": [{"name": ["w"], "types": ["v"]}]}, ["tasks.0.name = ['w']", "string"]),
        ({"tasks": [{"name": "w", "types": ["v"], "buckets": [3], "min_value": 1}]}, ["'w'", "drop min_value"]),
    ],
)
def test_what_is_wrong_is_named(raw: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(raw)
    for word in words:
        assert word in str(error.value)


def test_environment_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[ranking]\nport = 1234\n")
    assert load(path, {}).ranking.port == 1234
    assert load(path, {"RECSYS_RANKING__PORT": "4321", "RECSYS_LOG__KIND": "kafka"}).ranking.port == 4321
    with pytest.raises(ConfigError, match=r"ranking\.prt"):
        load(path, {"RECSYS_RANKING__PRT": "1"})


def test_a_file_lies_over_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        "seed = 1\n[retrieval.sources]\ntrending = 5\n[model]\ndim = 4\nattention = [8]"
    )
    (tmp_path / "sub").mkdir()
    over = tmp_path / "sub" / "over.toml"
    over.write_text('extends = "../base.toml"\n[retrieval.sources]\ncovisited = 7\n[model]\nattention = [2, 2]')
    config = load(over, {"RECSYS_SEED": "3"})
    assert (config.seed, config.model.dim, config.model.attention) == (3, 4, (2, 2))
    assert config.retrieval.sources == {"trending": 5, "covisited": 7}
    for text, why in (
        ('extends = "over.toml"', "extends itself"),
        ('extends = "gone.toml"', "gone.toml' does not exist: check `extends` in"),
        ("extends = 3", "must be one file's name"),
    ):
        over.write_text(text)
        with pytest.raises(ConfigError, match=why):
            load(over, {})


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.toml", {})
    path = tmp_path / "bad.toml"
    path.write_text("a = = b")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load(path, {})


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


def test_a_long_data_folder_gets_a_short_socket_of_its_own() -> None:
    near, far = (parse({"data_dir": f"/data/{'x' * 120}/{name}"}).parameter_address for name in "ab")
    assert near != far
    assert len(near) < 108
    assert parse({"data_dir": "/data"}).parameter_address == "unix:/data/parameter.sock"


def test_buckets_become_a_chain_of_tasks_whose_steps_make_the_expected_value() -> None:
    watch = {"name": "watch", "types": ["view"], "buckets": [3, 10, 30], "weight": 0.1, "prior": 0.5, "group": "watch"}
    config = parse({"tasks": [{"name": "click", "types": ["click"]}, watch], "ranking": {"value": "click * watch"}})
    assert [(t.name, t.after, t.min_value, t.group) for t in config.tasks[1:]] == [
        ("watch>3", "", 3, "watch"),
        ("watch>10", "watch>3", 10, "watch"),
        ("watch>30", "watch>10", 30, "watch"),
    ]
    assert config.quantities == {"watch": {"watch>3": 6.5, "watch>10": 13.5, "watch>30": 10.0}}
    assert [t.weight for t in config.tasks[1:]] == pytest.approx([0.65, 1.35, 1.0])
    assert config.value_names == ["click", "watch"]
    assert parse(config.model_dump(mode="json")) == config
