check: ; ruff check . && ruff format --check . && mypy
fix: ; ruff check --fix . && ruff format .
test: ; pytest
bench: ; pytest benchmarks/ --benchmark-only
.PHONY: check fix test bench
