"""Answers to questions: sampled by a model here, by vLLM, or by an endpoint that serves one."""
