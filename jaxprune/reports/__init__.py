"""What a person looks at: timings, pictures, plots."""
