"""The figures that the library has to reach: `python -m benchmarks`."""
