"""Faster forward and backward passes that training patches in, each proved equal to its reference in a test."""
