"""HTTP: connections, headers, bodies, origins and hosts, errors, health. Independent of protocols and models."""
