"""`POST /v1/messages`: requests parsed, answers rendered."""
