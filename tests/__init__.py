"""Tests; run with `trial tests`."""
