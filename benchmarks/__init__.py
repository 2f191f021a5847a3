"""Measurements behind `credence bench`, and the scripts whose results lie in ``benchmarks/results``."""
