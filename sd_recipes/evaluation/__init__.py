"""How good it is: held-out loss, pictures, scores."""
