"""Times and memory of layers and models beside torch's: ``python -m benchmarks --help``."""

import os

# The profiler that counts the allocations on the CPU would write a line about each of its stages.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
