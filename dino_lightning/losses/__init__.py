"""Objectives: modules and functions of tensors."""
