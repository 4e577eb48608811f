"""Charts: each is drawn once, as a matplotlib figure, and saved as PNG on paper or as SVG in a page's own colours."""
