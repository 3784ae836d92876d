"""OpenAI's protocol: requests parsed, answers rendered."""
