check: ; ruff check . && ruff format --check . && mypy
fix: ; ruff check --fix . && ruff format .
test: ; pytest -n auto --dist loadfile
bench: ; pytest benchmarks/ --benchmark-only
.PHONY: check fix test bench
