"""What is known about models besides their weights: aliases, and the sampling defaults of `generation_config.json`."""
