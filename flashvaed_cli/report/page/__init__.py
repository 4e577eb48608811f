"""`report.html`: one self-contained page to look at what was gained and lost, and where."""
