"""Data without a download: drawn scenes, and samples from files."""
