"""One self-contained HTML page of a run: readers of its files, plots as inline SVG, the page."""
