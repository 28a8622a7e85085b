"""One typed report of a run, and its renderings: JSON, Markdown, HTML, terminal."""
