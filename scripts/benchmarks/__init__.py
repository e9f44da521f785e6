"""What scripts/bench.py measures, an area a file."""
