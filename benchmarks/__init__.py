"""Times and memory of the layers beside torch's: ``python -m benchmarks --help``."""
