"""The tiered KV store: registered DRAM, local SSD, remote object storage."""
