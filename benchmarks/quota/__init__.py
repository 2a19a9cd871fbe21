"""How alike the prefill batches of a group are under compute-quota chunking, and under
fixed-size chunks: ``python -m benchmarks.quota --json OUT``; see docs/prefill.md."""
