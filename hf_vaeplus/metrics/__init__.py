"""Metrics: features or posteriors in, a number out. No module here builds a model."""
