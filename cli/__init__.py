"""The ``fpo`` command."""
