"""The scheduler alone: how fast it decides, and how even it keeps a fluid model's NICs."""
