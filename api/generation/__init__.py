"""What all generating endpoints share: parsed requests, the job queue, the relay of events, live models, delivery of responses."""
