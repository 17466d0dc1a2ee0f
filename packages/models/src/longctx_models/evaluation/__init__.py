"""Evaluation of long-context methods."""
