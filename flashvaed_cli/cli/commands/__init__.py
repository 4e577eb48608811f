"""The commands, in the order of the program's help: one file each, and a list of those with a recipe model."""

from typing import Any

from flashvaed_cli.cli.commands import analyze, convert_ops, decode, distill, evaluate, export, info, prune
from flashvaed_cli.cli.signature import Command

COMMANDS: tuple[Command[Any], ...] = tuple(
    module.COMMAND for module in (analyze, prune, convert_ops, distill, evaluate, export, decode, info)
)
