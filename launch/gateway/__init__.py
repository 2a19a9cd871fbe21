"""The front door: OpenAI's API, admission, and the walk of each request."""
