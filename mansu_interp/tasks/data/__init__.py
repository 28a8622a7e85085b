"""Rows that users bring: read, checked, and made into pairs."""
