"""`report.html`: one self-contained page that shows what was gained and lost, and where."""
