"""`flashvaed export`: what it writes for which program."""

from flashvaed_cli.stages.export.run import run_export

__all__ = ["run_export"]
