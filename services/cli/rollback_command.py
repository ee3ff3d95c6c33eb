"""`recsys rollback`: let trainer and serving go back to a checkpoint that is kept."""

from __future__ import annotations

import argparse

from recsys import config
from recsys.errors import BadInput
from recsys.files import KeptManifests
from recsys.training import commands
from services.cli.checkpoint_command import folder_of, told
from services.cli.main import DONE, emit


def run(options: argparse.Namespace) -> int:
    """Leave the command for the trainer. BadInput names the checkpoints that there are."""
    folder = folder_of(config.load(options.config))
    kept = KeptManifests(folder)
    manifests = {manifest["step"]: manifest for manifest in kept.every()}
    if (wanted := manifests.get(options.to)) is None:
        there = ", ".join(map(str, manifests)) or "none"
        raise BadInput(
            f"--to {options.to}: there is no such checkpoint, there are {there}: see `recsys checkpoint list`"
        )
    kept.want(wanted)  # a running trainer may take two more before it looks, and delete this one
    if not told(folder, wanted, None)["whole"]:
        kept.unwant()
        raise BadInput(f"--to {options.to}: files of it are gone: see `recsys checkpoint list`")
    how = commands.SKIP if options.skip else commands.LEARN
    commands.leave(folder, commands.ROLLBACK, how, step=options.to)
    after = "what came after it is left out" if options.skip else "what came after it is learned again"
    emit(
        options,
        {"ok": True, "to": options.to, "after": how},
        f"trainer and serving go back to checkpoint {options.to} within some seconds, or when the trainer is started; {after}",
    )
    return DONE
