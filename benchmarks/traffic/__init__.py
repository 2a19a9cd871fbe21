"""Does KV movement disturb inference? Two hosts, one link, real Mooncake processes."""
