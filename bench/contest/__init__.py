"""The pool against peer servers, in interleaved rounds of one run."""
