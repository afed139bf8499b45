"""Measuring a pruned model against its dense model: quality, speed, memory, and the report."""
