"""Decoding, boxes to crop, resizing and augmentation."""
