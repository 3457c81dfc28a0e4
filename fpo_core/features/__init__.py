"""SAE features of responses: pooling, top-k, the discrepancy, per-feature statistics."""
