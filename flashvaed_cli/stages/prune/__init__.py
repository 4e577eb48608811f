"""`flashvaed prune`: choose channels, refit the weights, judge the result."""
