"""The six stages: artifact in, artifact out. The only room that composes the others."""
