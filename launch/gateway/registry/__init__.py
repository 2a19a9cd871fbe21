"""Which nodes belong to the cluster now: leases, numbers, and the routes by which nodes come."""
