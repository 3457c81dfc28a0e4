"""Evaluation of a policy against its reference: held-out pairs, sampled answers, intervals."""
