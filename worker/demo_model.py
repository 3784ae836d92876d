"""`python -m worker.demo_model`: the command; see `worker.models.demo_model`."""

from worker.models.demo_model import main

if __name__ == "__main__":
    main()
