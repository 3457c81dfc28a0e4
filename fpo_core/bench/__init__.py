"""Benchmarks that people cite: AlpacaEval 2, Arena-Hard, MT-Bench, IFEval."""
