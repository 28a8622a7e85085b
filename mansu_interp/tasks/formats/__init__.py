"""Rows as people have them: the formats of files, and the shapes of published data."""
