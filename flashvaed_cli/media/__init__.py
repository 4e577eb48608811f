"""Video in and out with PyAV, clip sampling, padding."""
