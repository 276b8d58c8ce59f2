"""Tokenizers that ship with the package."""
