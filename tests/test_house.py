"""The house rules that no linter knows: sizes, one home for each driver, no silent skips, documents that match the code."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, ROOT, options

MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 7
MAX_CLASS_LINES, MAX_METHODS = 200, 15
SHARED_NAMES = {"base", "main"}
"""Module names that say the same thing in every folder."""
DRIVERS = {
    "kafka": ("recsys/streams/kafka", "recsys/testing/servers.py"),
    "redis": ("recsys/state/redis.py", "recsys/testing/servers.py"),
    "faiss": ("recsys/retrieval/item_index.py", "load_tests/retrieval.py"),
    "torch": (
        # The networks as they learn, and the scoring of one that the kernels do not know.
        *(
            f"recsys/model/{name}.py"
            for name in ("ranker", "home", "din", "two_tower", "layers", "correct", "networks")
        ),
        *(f"recsys/model/{name}.py" for name in ("assemble", "axes", "eager", "fused", "torch_scoring")),
        *(f"recsys/model/{name}.py" for name in ("learning_home", "learning_parts")),
        "recsys/training/",
        "recsys/table/cuda",
        "load_tests/fbgemm.py",
        "load_tests/models.py",
        "load_tests/plain_model.py",
        "load_tests/replay.py",
        "load_tests/table.py",
        "load_tests/table_gpu.py",
        # These set the number of threads before anything else runs.
        "services/trainer/main.py",
        "services/cli/replay_command.py",
    ),
}
UNSEEN = {"__pycache__", "build", "dist", "recsys-data", "node_modules", "shared"}
FORBIDDEN = ("/wor" + "k/", "/tmp/" + "venv", "TO" + "DO", "FIX" + "ME")


def files(*roots: str, suffix: str = "") -> Iterator[Path]:
    """The repository's own files below the roots; generated code and what git ignores left out."""
    for root in roots:
        for path in sorted((ROOT / root).rglob(f"*{suffix}")):
            parts = path.relative_to(ROOT).parts
            hidden = any(p in UNSEEN or p.endswith(".egg-info") or (p[0] == "." and p != ".ci") for p in parts[:-1])
            if path.is_file() and not hidden and "_pb2" not in path.name:
                yield path


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


CODE = [pytest.param(path, id=named(path)) for path in files("recsys", "services", "load_tests", suffix=".py")]
TESTS = [pytest.param(path, id=named(path)) for path in files("tests", suffix=".py")]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", CODE)
def test_module_and_its_functions_are_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{named(path)} has {lines} lines: it has two subjects, split it"
    for node in functions(path):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{named(path)}:{node.lineno} {node.name} has {length} lines"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        assert count <= MAX_PARAMETERS, f"{named(path)}:{node.lineno} {node.name} has {count} parameters"


def large_classes() -> Iterator[tuple[str, str]]:
    """Name and size of each class of the product beyond the limits; a method called by the language itself does not count."""
    for path in files("recsys", "services", suffix=".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                methods = [one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
                count = sum(not name.startswith("__") for name in methods)
                if lines > MAX_CLASS_LINES or count > MAX_METHODS:
                    yield f"{named(path)}:{node.name}", f"{lines} lines and {count} methods"


def test_class_has_one_subject() -> None:
    large = dict(large_classes())
    assert not large, f"at most {MAX_CLASS_LINES} lines and {MAX_METHODS} methods: {large}"


def test_module_name_is_used_once() -> None:
    stems = Counter(path.stem for path in files("recsys", "services", suffix=".py"))
    twice = {stem for stem, count in stems.items() if count > 1 and stem != "__init__"} - SHARED_NAMES
    assert not twice, "a reader looks for a module by its name: give these another one"


@pytest.mark.parametrize("path", CODE)
def test_driver_is_imported_only_at_its_seam(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots = {(node.module or "").split(".")[0]}
        else:
            continue
        for driver in roots & DRIVERS.keys():
            assert named(path).startswith(DRIVERS[driver]), (
                f"{named(path)}:{node.lineno} imports {driver}; only {', '.join(DRIVERS[driver])} may"
            )


@pytest.mark.parametrize("path", TESTS)
def test_only_a_missing_device_or_data_skips_a_test(path: Path) -> None:
    skipping = {"skip", "skipif", "importorskip", "xfail"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") in skipping):
            continue
        text = f"{named(path)} {ast.unparse(node)}".lower()
        assert re.search(r"cuda|gpu|shared|tmpfs", text), (
            f"{named(path)}:{node.lineno}: raise what is missing and how to install it; only a missing GPU, shared data or the "
            "right to mount a tmpfs may skip"
        )


def test_one_faiss_is_installed() -> None:
    installed = set(packages_distributions().get("faiss", []))
    assert len(installed) == 1, f"{sorted(installed)} share the module name faiss: uninstall all, then install one"


def test_no_file_names_a_workplace_or_leaves_a_note() -> None:
    found = []
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for path in [*top, *files("recsys", "services", "load_tests", "tests", "deploy", "docs", ".ci")]:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{named(path)}: {word!r}" for word in FORBIDDEN if word in text]
    assert not found


@pytest.mark.parametrize("path", DOCUMENTS)
def test_document_matches_the_code(path: str) -> None:
    committed = (ROOT / path).read_text(encoding="utf-8")
    assert committed == DOCUMENTS[path](), f"{path} is not what the code says: python -m tests.documents"


def test_every_option_says_what_it_is() -> None:
    silent = [name for name, field in options() if not (field.description or "").strip()]
    assert not silent, f"options without a docstring: {silent}"
