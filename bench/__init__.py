"""The benchmark of pixeldiff: `python -m bench --help`, described in bench/README.md."""
