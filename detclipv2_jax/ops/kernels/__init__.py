"""TPU kernels (Pallas) of layers in models/, each numerically equal to the plain layer."""
