"""The HTTP server: OpenAI's routes, an admin API, health and metrics, and the playground."""
