"""Linear layers whose weights are stored in blocks; torch and triton only."""
