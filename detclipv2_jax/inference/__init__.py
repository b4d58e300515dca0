"""From a checkpoint to detections: prompts, prediction, images, video, drawing. No TensorFlow."""
