"""Layers of models/ as TPU kernels, each equal to the plain one."""
