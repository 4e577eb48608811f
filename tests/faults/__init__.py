"""Faults on purpose: every call that changes a file fails once, in every command, and nothing is lost."""
