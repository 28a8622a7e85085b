"""One typed report of a run, and its renderings: JSON, Markdown, HTML, terminal.

Public, from `mansu_interp`: Report. The rest is implementation.
"""
