"""Who holds which block, as the gateway has heard."""
