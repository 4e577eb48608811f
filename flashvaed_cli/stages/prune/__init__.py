"""`flashvaed prune`: choose channels, fit what is left, judge it."""
