"""`flashvaed distill`: data, phases, records of a training."""
