"""DetCLIPv2 in JAX: open-vocabulary detection pre-training from boxes, phrases and captions at once."""
