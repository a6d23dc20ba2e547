"""Real data sets, one file each: the rows, how they are split, and what scikit-learn reaches on them."""
