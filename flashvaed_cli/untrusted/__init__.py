"""Opening files that anybody may have made: bounded in time and memory, and no code of theirs is run."""
