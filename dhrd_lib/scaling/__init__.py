"""The frozen-trunk cache and fully sharded training."""
