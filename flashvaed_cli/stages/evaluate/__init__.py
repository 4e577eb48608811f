"""`flashvaed eval`: the original decoder and derived ones on the same latents."""

from flashvaed_cli.stages.evaluate.run import run_evaluate

__all__ = ["run_evaluate"]
