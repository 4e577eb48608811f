"""A folder for each family of VAEs: architecture, key names, configuration, statistics, what other programs read.

A new family is a folder here and a line in `registry.py`.
"""
