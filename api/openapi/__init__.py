"""`GET /openapi.json`: the OpenAPI description of all endpoints, for client generators, gateways and fuzzers.

Generated from the types that parse requests and from the tables that the checks use (`NEUTRAL`, `ONLY_WITH`), so that it
cannot differ from the code. Statuses and headers are described here.
https://spec.openapis.org/oas/v3.1.1
"""
