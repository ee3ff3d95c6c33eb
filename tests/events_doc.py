"""The tagged code blocks of docs/events.md: examples and schemas that tests read."""

from __future__ import annotations

import re
from pathlib import Path

DOC = Path(__file__).resolve().parents[1] / "docs" / "events.md"


def blocks(tag: str) -> list[str]:
    """The contents of every block that opens with this tag, such as `json feedback` or `sh item`."""
    return re.findall(rf"^```{re.escape(tag)}\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.S | re.M)


def curl_body(tag: str) -> str:
    """What the curl example of this tag sends."""
    [command] = blocks(f"sh {tag}")
    return command.split("-d '")[1].rsplit("'", 1)[0]
