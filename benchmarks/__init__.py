"""Measurements of the operators: compiler's report (no GPU needed), pytest-benchmark suites, block-size search."""
