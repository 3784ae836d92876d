"""OpenAI's `/v1/responses`: parsing, rendering and the stored responses."""
