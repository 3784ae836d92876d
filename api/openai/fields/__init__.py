"""Fields of requests that several of OpenAI's endpoints have: their types, their checks, and what they mean for a job."""
