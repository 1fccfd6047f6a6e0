"""Classifiers with labels, on features or a trained backbone."""
