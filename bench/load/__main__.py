"""`python -m bench.load`."""

import sys

from bench.load.streams import main

if __name__ == "__main__":
    sys.exit(main())
