"""The two ends of inference: from uint8 images to network inputs, from scores to class ids."""
