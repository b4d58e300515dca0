"""Parts of the model as TPU kernels, each equal to what models/ writes in plain JAX."""
