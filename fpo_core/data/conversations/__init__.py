"""Conversations: the one inner form that every shape of data is read into."""
