"""HTTP: connections, headers, bodies, errors, health."""
