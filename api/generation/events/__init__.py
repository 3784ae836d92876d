"""The events of jobs as they arrive: one pub/sub connection, a subscription a job, and the sources of a response's events."""
