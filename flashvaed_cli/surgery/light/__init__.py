"""The first weights of light decoders, which have no original to be cut from."""
