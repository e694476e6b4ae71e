"""Benchmarks, their report, and the demo."""
