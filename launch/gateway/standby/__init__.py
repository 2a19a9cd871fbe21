"""A second gateway that knows what the first one knows, and takes over when it is silent."""
