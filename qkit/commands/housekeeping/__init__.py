"""`qkit ls`, `rm` and `gc`: in come folders, out go what runs are there, and what can be deleted. No model is opened."""
