check: ; ruff check . && ruff format --check . && mypy
fix: ; ruff check --fix . && ruff format .
test: ; pytest -n auto --dist loadfile
test-all: ; pytest -n auto --dist loadfile -m ""
bench: ; pytest benchmarks/ --benchmark-only
.PHONY: check fix test test-all bench
