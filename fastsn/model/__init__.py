"""Calls for a whole model: accelerate, apply, fold, policies, caches, checks."""
