"""Triton backends of the ops, one file per op. Import needs Triton; pixeldiff itself does not."""
