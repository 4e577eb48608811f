"""`flashvaed export`: write a decoder for other programs."""
