"""All of RQ and Redis in a worker: taking jobs, leases, takeover, the journal."""
