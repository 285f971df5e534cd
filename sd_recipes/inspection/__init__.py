"""Looking at a data set before training on it: what is wrong with its rows, and how its pixels are distributed."""
