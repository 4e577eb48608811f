"""`flashvaed eval`: the original decoder and derived ones on the same latents."""
