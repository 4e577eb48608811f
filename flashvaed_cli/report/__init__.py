"""Tables, pictures and pages. Never runs a model."""
