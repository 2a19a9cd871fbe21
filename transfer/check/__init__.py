"""What network is this, which traffic classes take effect on it, and what does it cost if not."""
