"""`python -m bench.contest`."""

import sys

from bench.contest.rounds import main

if __name__ == "__main__":
    sys.exit(main())
