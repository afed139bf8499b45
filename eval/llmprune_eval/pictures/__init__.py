"""The pictures of a run's report, each in a file of its own, as inline SVG."""
