"""Language models: finding and loading them, and reading activations from them."""
