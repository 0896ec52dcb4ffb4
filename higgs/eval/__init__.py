"""Evaluation: metrics as pure functions on tensors and texts, judges (networks that listen), and the runs around them."""
