"""What the API and the workers must agree on: settings, wire types, names, errors, connections, logging."""
