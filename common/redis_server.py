"""`python -m common.redis_server`: the command; see `common.pool.redis_server`."""

import sys

from common.pool.redis_server import main

if __name__ == "__main__":
    sys.exit(main())
