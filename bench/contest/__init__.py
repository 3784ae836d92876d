"""The pool beside its peers, in one run."""
