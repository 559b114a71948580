"""Curricula over denoising tasks, and the training that uses and judges them."""
