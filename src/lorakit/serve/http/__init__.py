"""The HTTP server: OpenAI's API, keys and quotas, metrics."""
