"""`flashvaed export`: what it writes for which program."""
