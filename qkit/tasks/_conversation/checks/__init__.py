"""The checks of conversations: what makes a record unusable (validity.py), what is odd about a finished row (of_rows.py), about template and
tokenizer (of_setup.py), and what each finding means (kinds.py)."""
