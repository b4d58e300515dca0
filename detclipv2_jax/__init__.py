"""DetCLIPv2 in JAX: open-vocabulary detection pre-training on boxes, phrases and captions."""
