"""Pure tensor maths: greedy R2, ridge least squares, depthwise-separable fits."""
