"""One run as one page: what was read, turned into tables, figures and trees of a self-contained HTML file."""
