"""One thin script a table or figure; run as `python -m experiments.<name>`."""
