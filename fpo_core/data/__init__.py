"""Preference data: reading rows, tokenizing pairs, batches."""
