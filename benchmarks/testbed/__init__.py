"""A cluster of network namespaces on one machine, each with a storage and a compute NIC of
limited rate, in which arms race: ``python -m benchmarks.testbed offline --json OUT``."""
