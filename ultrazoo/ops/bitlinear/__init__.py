"""BitNet b1.58: ternary weights, int8 activations, for training and packed for inference."""
