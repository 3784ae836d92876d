"""HTTP: connections, headers, bodies, origins and hosts, errors, server-sent events. Independent of protocols and models."""
