"""The worker: RQ jobs in, events out; one process, one model; never speaks HTTP."""
