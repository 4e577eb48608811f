"""A folder for each family of VAEs: architecture, key names, configuration, statistics, use in other programs.

A new family is a folder here and a line in `registry.py`.
"""
