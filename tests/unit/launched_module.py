"""What `test_launch.py` starts: it prints what it was given."""

import os
import sys

print(os.environ["XLA_FLAGS"], *sys.argv[1:])
