"""Commands that an operator leaves in files of the trainer's folder: a name of their own, and what to do."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

RESUME, ROLLBACK = "resume", "rollback"
"""Files of the commands that there are: what an open breaker waits for; go back to a checkpoint."""
LEARN, SKIP = "learn", "skip"
"""How: learn from what waited, or leave it out."""


def leave(folder: Path, command: str, how: str, **more: Any) -> None:
    """Tell the trainer that keeps its state in this folder; a command that was left before is replaced."""
    temporary = folder / f"{command}.new"
    temporary.write_text(json.dumps({"name": uuid.uuid4().hex, "how": how, **more}))
    temporary.replace(folder / command)


def read(folder: Path, command: str) -> dict[str, Any] | None:
    """The command that was left, if there is one. Earlier versions wrote a word alone, which is its name, too."""
    path = folder / command
    if not path.exists():
        return None
    text = path.read_text().strip()
    try:
        found = json.loads(text)
        return {**found, "name": str(found["name"]), "how": SKIP if found["how"] == SKIP else LEARN}
    except (ValueError, KeyError, TypeError):
        return {"name": text, "how": SKIP if text == SKIP else LEARN}


def forget(folder: Path, command: str) -> None:
    """It was followed, or cannot be."""
    (folder / command).unlink(missing_ok=True)
