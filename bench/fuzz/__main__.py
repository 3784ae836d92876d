"""`python -m bench.fuzz`."""

import sys

from bench.fuzz.fuzzer import main

if __name__ == "__main__":
    sys.exit(main())
