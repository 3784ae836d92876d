"""What users would measure, against peers, in one run. See RESULTS.md."""
