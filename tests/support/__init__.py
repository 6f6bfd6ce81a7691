"""Helpers of the tests: networks, runs, problems; and scripts that tests start as processes of their own."""
