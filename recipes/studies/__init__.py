"""Side-by-side experiments: `bp-torch study NAME`."""
