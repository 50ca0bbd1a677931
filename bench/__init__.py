"""Benchmarks: one registry of cases, one runner, rows as JSON lines. See README.md in this folder."""
