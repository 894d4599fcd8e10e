.PHONY: install test test-slow style quality

install:    ; pip install -r requirements.txt && pip install -e ".[dev]"
test:       ; python -m pytest
test-slow:  ; python -m pytest -m "not gpu" -n 0
style:      ; ruff check --fix . && ruff format .
quality:    ; ruff check . && ruff format --check . && mypy
