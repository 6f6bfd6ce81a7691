"""Helpers of the tests: networks, runs and problems, and scripts that tests start as separate processes."""
