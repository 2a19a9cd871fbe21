"""Who may come in by HTTP, and as whom."""
