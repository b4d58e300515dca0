"""Detections to average precision on LVIS and COCO-format sets, as a function and as a job."""
