"""`flashvaed info`."""

from __future__ import annotations

import typer

from flashvaed_cli.cli.running import run_stage
from flashvaed_cli.cli.signature import USING_PANEL, Command
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.recipe import InfoRecipe


def info(context: typer.Context, settings: InfoRecipe) -> None:
    """Show what a file is, where it came from, what was measured on it, and what to do next.

    Reads artifacts and other programs' checkpoints; with several files, shows how they differ. Writes nothing.
    """
    from flashvaed_cli.stages.info.run import run_info

    failed = run_stage(context, run_info, settings).as_dict().get("failed")
    if isinstance(failed, list) and failed:
        raise ArtifactError("\n".join(one["message"] for one in failed))


COMMAND = Command(
    recipe=InfoRecipe,
    run=info,
    options=("size",),
    common=("family", "weights", "allow_download"),
    switches=("quiet", "json_output"),
    help_panel=USING_PANEL,
    examples=(
        "flashvaed info flash.safetensors",
        "flashvaed info Wan2.1_VAE.pth --size 81x480x832",
        "flashvaed info pruned.safetensors flash.safetensors",
        "flashvaed info flash.safetensors --json | jq '.files[0].decoder.gflop'",
    ),
)
